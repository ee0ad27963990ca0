"""The kvstore's Prometheus page; docs/api.md lists the names."""

from __future__ import annotations

from tokenrelay.ledger.api import State
from tokenrelay.ledger.states import TERMINAL
from tokenrelay.services.chassis.metrics import Page
from tokenrelay.services.kvstore.backend import EtcdBackend
from tokenrelay.services.kvstore.servicer import KvstoreServicer
from tokenrelay.services.kvstore.store import Store


def render(store: Store, servicer: KvstoreServicer, backend: EtcdBackend | None, unauthenticated: int) -> str:
    """The page."""
    page, host, books = Page(), store.host, store.host.books
    status = servicer.status()
    roles = {f'role="{role}"': int(role == status.role) for role in ("active", "standby", "suspended", "recovering")}
    page.add("kvstore_role", "gauge", "1 for the role this process has now", roles)
    page.add("kvstore_term", "gauge", "the term under which handles are named", {"": host.term})
    page.add("kvstore_members", "gauge", "members alive", {"": len(host.roster.members())})
    page.add("kvstore_sessions", "gauge", "clients connected", {"": servicer.sessions_open})
    open_states = {f'state="{s.value}"': books.counts[s] for s in State if s not in TERMINAL}
    page.add("kvstore_handles", "gauge", "open KV handles by state", open_states)
    over = {f'state="{s.value}"': books.counts[s] for s in State if s in TERMINAL}
    page.add("kvstore_handles_total", "counter", "KV handles that ended, by how", over)
    duties = {f'duty="{duty.value}"': count for duty, count in host.duties.items()}
    page.add("kvstore_handles_overdue", "gauge", "handles past their deadline, by what is due", duties)
    moves = {f'event="{event.value}"': count for event, count in host.transitions.items()}
    page.add("kvstore_transitions_total", "counter", "transitions made, by event", moves)
    refusals = {f'code="{code.value}"': count for code, count in host.refusals.items()}
    page.add("kvstore_refusals_total", "counter", "calls refused, by code", refusals)
    malformed = {f'what="{what}"': count for what, count in store.malformed.items()}
    page.add("kvstore_malformed_total", "counter", "messages that no client sends, by kind", malformed)
    page.add("kvstore_unauthenticated_total", "counter", "calls without the fleet's token", {"": unauthenticated})
    page.add("kvstore_directory_entries", "gauge", "block hashes known", {"": len(store.directory.directory)})
    page.add(
        "kvstore_directory_resyncs_total", "counter", "gaps that made a worker tell all", {"": store.directory.resyncs}
    )
    tier = store.tier
    if tier is not None:
        sizes = {'where="memory"': tier.memory, 'where="disk"': tier.disk}
        page.add("kvstore_tier_blocks", "gauge", "blocks kept", {where: len(kept) for where, kept in sizes.items()})
        page.add("kvstore_tier_bytes", "gauge", "bytes kept", {where: kept.bytes for where, kept in sizes.items()})
        events = {f'event="{event}"': count for event, count in sorted(tier.counts.items())}
        page.add("kvstore_tier_events_total", "counter", "what happened to blocks of the tier", events)
    if backend is not None:
        page.add("kvstore_etcd_errors_total", "counter", "requests to etcd that failed", {"": backend.etcd.errors})
        page.add("kvstore_journal_writes_total", "counter", "keys written to etcd", {"": backend.journal.writes})
        page.add("kvstore_journal_waiting", "gauge", "keys not written to etcd yet", {"": len(backend.journal)})
    return page.text()
