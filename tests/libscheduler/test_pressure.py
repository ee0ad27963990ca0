"""What the scheduler answers when the pool is too small, scenario by scenario. See transcripts.py for the words."""

from __future__ import annotations

from transcripts import check_transcript, make_config


def test_preempted_and_computed_again() -> None:
    """The younger one gives way, keeps its tokens, and comes back in front of who came later."""
    check_transcript(
        make_config(blocks=4, context_tokens=64, steps_in_flight=1),
        """
        submit 1 A30 max=4
          accepted
        submit 2 B15 max=4
          accepted
        plan
          step 1: 1 prefills [0, 30) and samples, admitted to slot 0 with 0 cached
          step 1: 2 prefills [0, 15) and samples, admitted to slot 1 with 0 cached
        submit 3 C5
          accepted
        commit 1 1
          1 gives 1 first, 0 cached
          2 gives 1 first, 0 cached
        plan
          step 2: 1 decodes 30
          step 2: 2 decodes 15
        commit 2 2
          1 gives 2
          2 gives 2
        plan
          step 3: 1 decodes 31
          step 3: 2 decodes 16
        commit 3 3
          1 gives 3
          2 gives 3
        plan
          step 4: 1 decodes 32
        counts
          blocks 0 free 1 cached 3 active; sequences 2 waiting 1 running; preemptions 1
        explain 2
          Waiting: prompt 15 tokens, output 3 of 4; wants 2 blocks, 1 are free or cached
        commit 4
          1 gives 4 (length)
        plan
          step 5: 2 prefills [16, 18) and samples, admitted to slot 0 with 16 cached
          step 5: 3 prefills [0, 5) and samples, admitted to slot 1 with 0 cached
        commit 4 9
          2 gives 4 (length)
          3 gives 9 (length) first, 0 cached
        counts
          blocks 2 free 2 cached 0 active; sequences 0 waiting 0 running; preemptions 1
        usage
          prompt 50 cached 0 output 9
        """,
    )


def test_preempted_in_flight() -> None:
    """What a launched step samples for it still counts; its blocks come back at that step's commit."""
    check_transcript(
        make_config(blocks=7, context_tokens=64),
        """
        submit 1 A48 max=9
          accepted
        submit 2 B16 max=9
          accepted
        submit 3 C20 max=9
          accepted
        plan
          step 1: 1 prefills [0, 48) and samples, admitted to slot 0 with 0 cached
          step 1: 2 prefills [0, 16) and samples, admitted to slot 1 with 0 cached
          step 1: 3 prefills [0, 20) and samples, admitted to slot 2 with 0 cached
        plan
          step 2: 1 decodes 48 from feedback
        explain 2
          Decoding: prompt 16 tokens, output 0 of 9; slot 1, 16 tokens computed or launched, 1 steps in flight
        explain 3
          Preempting: prompt 20 tokens, output 0 of 9; slot 2, 20 tokens computed or launched, 1 steps in flight
        plan
          nothing
        commit 1 2 3
          1 gives 1 first, 0 cached
          2 gives 2 first, 0 cached
          3 gives 3 first, 0 cached
        explain 3
          Waiting: prompt 20 tokens, output 1 of 9
        counts
          blocks 1 free 1 cached 5 active; sequences 1 waiting 2 running; preemptions 1
        plan
          step 3: 1 decodes 49 from feedback
          step 3: 2 decodes 16
        commit 1
          1 gives 1
        plan
          step 4: 1 decodes 50 from feedback
          step 4: 2 decodes 17 from feedback
        commit 1 2
          1 gives 1
          2 gives 2
        """,
    )


def test_preempted_and_ended_by_its_last_token() -> None:
    """The token in flight was its stop: it is not computed again."""
    check_transcript(
        make_config(blocks=7, context_tokens=64),
        """
        submit 1 A48 max=9
          accepted
        submit 2 B16 max=9
          accepted
        submit 3 C20 max=9 stop=3
          accepted
        plan
          step 1: 1 prefills [0, 48) and samples, admitted to slot 0 with 0 cached
          step 1: 2 prefills [0, 16) and samples, admitted to slot 1 with 0 cached
          step 1: 3 prefills [0, 20) and samples, admitted to slot 2 with 0 cached
        plan
          step 2: 1 decodes 48 from feedback
        explain 3
          Preempting: prompt 20 tokens, output 0 of 9; slot 2, 20 tokens computed or launched, 1 steps in flight
        commit 1 2 3
          1 gives 1 first, 0 cached
          2 gives 2 first, 0 cached
          3 gives 3 (stop) first, 0 cached
        counts
          blocks 1 free 1 cached 5 active; sequences 0 waiting 2 running; preemptions 1
        """,
    )


def test_preempted_and_aborted() -> None:
    """An abort finds it in every state."""
    check_transcript(
        make_config(blocks=7, context_tokens=64),
        """
        submit 1 A48 max=9
          accepted
        submit 2 B16 max=9
          accepted
        submit 3 C20 max=9
          accepted
        plan
          step 1: 1 prefills [0, 48) and samples, admitted to slot 0 with 0 cached
          step 1: 2 prefills [0, 16) and samples, admitted to slot 1 with 0 cached
          step 1: 3 prefills [0, 20) and samples, admitted to slot 2 with 0 cached
        plan
          step 2: 1 decodes 48 from feedback
        abort 3
          ABORTED
        counts
          blocks 0 free 0 cached 7 active; sequences 0 waiting 3 running; preemptions 1
        commit 1 2 9
          1 gives 1 first, 0 cached
          2 gives 2 first, 0 cached
        counts
          blocks 2 free 0 cached 5 active; sequences 0 waiting 2 running; preemptions 1
        """,
    )


def test_the_least_recently_used_is_evicted_from_its_end() -> None:
    """The beginning of a prompt outlives its end."""
    check_transcript(
        make_config(blocks=6, context_tokens=96, steps_in_flight=1),
        """
        submit 1 A64
          accepted
        plan
          step 1: 1 prefills [0, 64) and samples, admitted to slot 0 with 0 cached
        commit 1
          1 gives 1 (length) first, 0 cached
        counts
          blocks 2 free 4 cached 0 active; sequences 0 waiting 0 running; preemptions 0
        submit 2 B48
          accepted
        plan
          step 2: 2 prefills [0, 48) and samples, admitted to slot 0 with 0 cached
        commit 1
          2 gives 1 (length) first, 0 cached
        submit 3 A64
          accepted
        plan
          step 3: 3 prefills [48, 64) and samples, admitted to slot 0 with 48 cached
        commit 1
          3 gives 1 (length) first, 48 cached
        counts
          blocks 0 free 6 cached 0 active; sequences 0 waiting 0 running; preemptions 0
        """,
    )


def test_a_prompt_halfway_gives_way_to_an_older_decode() -> None:
    """The worst-ranked one is preempted, whatever it does; what it sealed stays as cache until it is needed."""
    check_transcript(
        make_config(blocks=10, context_tokens=128, chunk_tokens=16, steps_in_flight=1),
        """
        submit 1 A45 max=9
          accepted
        submit 2 B29 max=9
          accepted
        plan
          step 1: 1 prefills [0, 16), admitted to slot 0 with 0 cached
          step 1: 2 prefills [0, 16), admitted to slot 1 with 0 cached
        commit
          no tokens
        plan
          step 2: 1 prefills [16, 32)
          step 2: 2 prefills [16, 29) and samples
        commit 7
          2 gives 7 first, 0 cached
        plan
          step 3: 2 decodes 29
          step 3: 1 prefills [32, 45) and samples
        commit 7 7
          2 gives 7
          1 gives 7 first, 0 cached
        plan
          step 4: 1 decodes 45
          step 4: 2 decodes 30
        commit 7 7
          1 gives 7
          2 gives 7
        submit 3 C60 max=2
          accepted
        plan
          step 5: 1 decodes 46
          step 5: 2 decodes 31
          step 5: 3 prefills [0, 16), admitted to slot 2 with 0 cached
        commit 7 7
          1 gives 7
          2 gives 7
        plan
          step 6: 1 decodes 47
          step 6: 2 decodes 32
          step 6: 3 prefills [16, 32)
        commit 7 7
          1 gives 7
          2 gives 7
        counts
          blocks 0 free 0 cached 10 active; sequences 0 waiting 3 running; preemptions 0
        plan
          step 7: 1 decodes 48
          step 7: 2 decodes 33
        counts
          blocks 1 free 2 cached 7 active; sequences 1 waiting 2 running; preemptions 1
        explain 3
          Waiting: prompt 60 tokens, output 0 of 2; wants 4 blocks, 3 are free or cached
        """,
    )
