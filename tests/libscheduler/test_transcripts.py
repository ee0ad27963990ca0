"""What the scheduler answers, scenario by scenario. See transcripts.py for the words."""

from __future__ import annotations

from transcripts import check_transcript, make_config


def test_a_step_at_a_time() -> None:
    """Without planning ahead every token is known before the next row is planned."""
    check_transcript(
        make_config(steps_in_flight=1),
        """
        submit 1 A40 max=2
          accepted
        plan
          step 1: 1 prefills [0, 40) and samples, admitted to slot 0 with 0 cached
        plan
          nothing
        commit 7
          1 gives 7 first, 0 cached
        plan
          step 2: 1 decodes 40
        commit 8
          1 gives 8 (length)
        plan
          nothing
        counts
          blocks 30 free 2 cached 0 active; sequences 0 waiting 0 running; preemptions 0
        """,
    )


def test_planning_ahead_feeds_back() -> None:
    """A row is planned on a token that is not known yet; nothing is planned past the length limit."""
    check_transcript(
        make_config(),
        """
        submit 1 A20 max=4
          accepted
        plan
          step 1: 1 prefills [0, 20) and samples, admitted to slot 0 with 0 cached
        plan
          step 2: 1 decodes 20 from feedback
        plan
          nothing
        commit 7
          1 gives 7 first, 0 cached
        plan
          step 3: 1 decodes 21 from feedback
        commit 8
          1 gives 8
        commit 9
          1 gives 9
        plan
          step 4: 1 decodes 22
        commit 10
          1 gives 10 (length)
        counts
          blocks 31 free 1 cached 0 active; sequences 0 waiting 0 running; preemptions 0
        """,
    )


def test_a_stop_discards_the_row_planned_ahead() -> None:
    """The sequence ends at the commit, what it holds at the commit of the last launched step."""
    check_transcript(
        make_config(),
        """
        submit 1 A20 max=9 stop=5,6
          accepted
        plan
          step 1: 1 prefills [0, 20) and samples, admitted to slot 0 with 0 cached
        plan
          step 2: 1 decodes 20 from feedback
        commit 6
          1 gives 6 (stop) first, 0 cached
        counts
          blocks 30 free 0 cached 2 active; sequences 0 waiting 1 running; preemptions 0
        explain 1
          Finishing: prompt 20 tokens, output 1 of 9; slot 0, 21 tokens computed or launched, 1 steps in flight
        submit 1 A20
          rejected: DUPLICATE_ID
        abort 1
          ALREADY_ENDED
        commit 9
          no tokens
        counts
          blocks 31 free 1 cached 0 active; sequences 0 waiting 0 running; preemptions 0
        abort 1
          ALREADY_ENDED
        submit 1 A20
          accepted
        """,
    )


def test_decodes_come_first_and_prompts_come_in_chunks() -> None:
    """30 tokens a step: the decode takes one, the older prompt its chunk, the younger one what is left."""
    check_transcript(
        make_config(step_tokens=30, chunk_tokens=20),
        """
        submit 1 A10 max=3
          accepted
        plan
          step 1: 1 prefills [0, 10) and samples, admitted to slot 0 with 0 cached
        submit 2 B50
          accepted
        submit 3 C12
          accepted
        plan
          step 2: 1 decodes 10 from feedback
          step 2: 2 prefills [0, 20), admitted to slot 1 with 0 cached
          step 2: 3 prefills [0, 9), admitted to slot 2 with 0 cached
        commit 1
          1 gives 1 first, 0 cached
        commit 2
          1 gives 2
        plan
          step 3: 1 decodes 11
          step 3: 2 prefills [20, 40)
          step 3: 3 prefills [9, 12) and samples
        plan
          step 4: 2 prefills [40, 50) and samples
        commit 3 4
          1 gives 3 (length)
          3 gives 4 (length) first, 0 cached
        commit 5
          2 gives 5 (length) first, 0 cached
        counts
          blocks 29 free 3 cached 0 active; sequences 0 waiting 0 running; preemptions 0
        """,
    )


def test_twins_wait_for_the_first() -> None:
    """One of three computes the prompt they share; the others wait for its block and take it from there."""
    check_transcript(
        make_config(chunk_tokens=32),
        """
        submit 1 A40 max=2
          accepted
        submit 2 A40 max=2
          accepted
        submit 3 A40+B9 max=2
          accepted
        plan
          step 1: 1 prefills [0, 32), admitted to slot 0 with 0 cached
        explain 2
          Held: prompt 40 tokens, output 0 of 2; waits for block 1, which another sequence computes
        plan
          step 2: 1 prefills [32, 40) and samples
        commit
          no tokens
        explain 2
          Waiting: prompt 40 tokens, output 0 of 2
        plan
          step 3: 1 decodes 40 from feedback
          step 3: 2 prefills [32, 40) and samples, admitted to slot 1 with 32 cached
          step 3: 3 prefills [32, 49) and samples, admitted to slot 2 with 32 cached
        commit 7
          1 gives 7 first, 0 cached
        counts
          blocks 26 free 0 cached 6 active; sequences 0 waiting 3 running; preemptions 0
        commit 8 5 6
          1 gives 8 (length)
          2 gives 5 first, 32 cached
          3 gives 6 first, 32 cached
        plan
          step 4: 2 decodes 40
          step 4: 3 decodes 49
        commit 7 7
          2 gives 7 (length)
          3 gives 7 (length)
        counts
          blocks 29 free 3 cached 0 active; sequences 0 waiting 0 running; preemptions 0
        """,
    )


def test_a_leader_that_is_aborted_lets_its_followers_go() -> None:
    """Its blocks are given up at once, though a launched step still writes them."""
    check_transcript(
        make_config(chunk_tokens=32),
        """
        submit 1 A40 max=2
          accepted
        submit 2 A40 max=2
          accepted
        plan
          step 1: 1 prefills [0, 32), admitted to slot 0 with 0 cached
        explain 2
          Held: prompt 40 tokens, output 0 of 2; waits for block 1, which another sequence computes
        abort 1
          ABORTED
        explain 2
          Waiting: prompt 40 tokens, output 0 of 2
        counts
          blocks 30 free 0 cached 2 active; sequences 1 waiting 1 running; preemptions 0
        plan
          step 2: 2 prefills [0, 32), admitted to slot 1 with 0 cached
        commit
          no tokens
        counts
          blocks 29 free 0 cached 3 active; sequences 0 waiting 1 running; preemptions 0
        commit
          no tokens
        plan
          step 3: 2 prefills [32, 40) and samples
        commit 7
          2 gives 7 first, 0 cached
        """,
    )


def test_abort_of_a_launched_prefill() -> None:
    """Blocks that launched steps write come back one commit after the other; the slot with the last one."""
    check_transcript(
        make_config(slots=1, chunk_tokens=16),
        """
        submit 1 A40 max=3
          accepted
        submit 2 A40 max=3
          accepted
        submit 3 B5 max=3
          accepted
        plan
          step 1: 1 prefills [0, 16), admitted to slot 0 with 0 cached
        plan
          step 2: 1 prefills [16, 32)
        explain 3
          Waiting: prompt 5 tokens, output 0 of 3; no slot is free
        abort 2
          ABORTED
        abort 2
          ALREADY_ENDED
        abort 1
          ABORTED
        abort 1
          ALREADY_ENDED
        explain 1
          Aborting: prompt 40 tokens, output 0 of 3; slot 0, 32 tokens computed or launched, 2 steps in flight
        counts
          blocks 30 free 0 cached 2 active; sequences 1 waiting 1 running; preemptions 0
        plan
          nothing
        commit
          no tokens
        counts
          blocks 31 free 0 cached 1 active; sequences 1 waiting 1 running; preemptions 0
        commit
          no tokens
        counts
          blocks 32 free 0 cached 0 active; sequences 1 waiting 0 running; preemptions 0
        explain 1
          Ended
        abort 1
          ALREADY_ENDED
        abort 99
          UNKNOWN
        plan
          step 3: 3 prefills [0, 5) and samples, admitted to slot 0 with 0 cached
        """,
    )


def test_abort_while_held() -> None:
    """A follower that is aborted is gone at once, and the leader goes on."""
    check_transcript(
        make_config(),
        """
        submit 1 A40
          accepted
        submit 2 A40
          accepted
        plan
          step 1: 1 prefills [0, 40) and samples, admitted to slot 0 with 0 cached
        abort 2
          ABORTED
        counts
          blocks 29 free 0 cached 3 active; sequences 0 waiting 1 running; preemptions 0
        commit 5
          1 gives 5 (length) first, 0 cached
        counts
          blocks 30 free 2 cached 0 active; sequences 0 waiting 0 running; preemptions 0
        """,
    )


def test_abort_of_a_decode_in_flight() -> None:
    """What it computed and sealed stays as cache."""
    check_transcript(
        make_config(),
        """
        submit 1 A36 max=9
          accepted
        plan
          step 1: 1 prefills [0, 36) and samples, admitted to slot 0 with 0 cached
        plan
          step 2: 1 decodes 36 from feedback
        commit 3
          1 gives 3 first, 0 cached
        abort 1
          ABORTED
        counts
          blocks 29 free 0 cached 3 active; sequences 0 waiting 1 running; preemptions 0
        plan
          nothing
        commit 4
          no tokens
        counts
          blocks 30 free 2 cached 0 active; sequences 0 waiting 0 running; preemptions 0
        submit 2 A36 max=1
          accepted
        plan
          step 3: 2 prefills [32, 36) and samples, admitted to slot 0 with 32 cached
        """,
    )


def test_refusals() -> None:
    """Each with its reason; a refused one leaves nothing behind."""
    check_transcript(
        make_config(context_tokens=64, waiting_max=2),
        """
        submit 1 A64
          rejected: PROMPT_TOO_LONG
        submit 1 A63 max=5
          accepted
        submit 1 A10
          rejected: DUPLICATE_ID
        submit 2 A10 max=0
          rejected: INVALID
        submit 2 A10 output_start=0 max=4
          rejected: INVALID
        submit 2 A10 output_start=11 max=4
          rejected: INVALID
        submit 2 A10 output_start=8 max=2
          rejected: INVALID
        submit 2 A10 output_start=8 max=3
          accepted
        submit 3 A10
          rejected: QUEUE_FULL
        plan
          step 1: 1 prefills [0, 63) and samples, admitted to slot 0 with 0 cached
          step 1: 2 prefills [0, 10) and samples, admitted to slot 1 with 0 cached
        commit 1 2
          1 gives 1 (length) first, 0 cached
          2 gives 2 (length) first, 0 cached
        submit 3 A10
          accepted
        counts
          blocks 29 free 3 cached 0 active; sequences 1 waiting 0 running; preemptions 0
        """,
    )


def test_lower_priority_numbers_go_first() -> None:
    """First come, first served inside a class."""
    check_transcript(
        make_config(slots=1, steps_in_flight=1),
        """
        submit 1 A10
          accepted
        submit 2 B10
          accepted
        submit 3 C10 priority=-1
          accepted
        submit 4 D10 priority=5
          accepted
        plan
          step 1: 3 prefills [0, 10) and samples, admitted to slot 0 with 0 cached
        commit 0
          3 gives 0 (length) first, 0 cached
        plan
          step 2: 1 prefills [0, 10) and samples, admitted to slot 0 with 0 cached
        commit 0
          1 gives 0 (length) first, 0 cached
        plan
          step 3: 2 prefills [0, 10) and samples, admitted to slot 0 with 0 cached
        commit 0
          2 gives 0 (length) first, 0 cached
        plan
          step 4: 4 prefills [0, 10) and samples, admitted to slot 0 with 0 cached
        commit 0
          4 gives 0 (length) first, 0 cached
        """,
    )


def test_a_salt_has_its_own_cache() -> None:
    """Another tenant's blocks are not found."""
    check_transcript(
        make_config(steps_in_flight=1),
        """
        submit 1 A40
          accepted
        plan
          step 1: 1 prefills [0, 40) and samples, admitted to slot 0 with 0 cached
        commit 1
          1 gives 1 (length) first, 0 cached
        submit 2 A40 salt=other
          accepted
        plan
          step 2: 2 prefills [0, 40) and samples, admitted to slot 0 with 0 cached
        commit 1
          2 gives 1 (length) first, 0 cached
        submit 3 A40
          accepted
        plan
          step 3: 3 prefills [32, 40) and samples, admitted to slot 0 with 32 cached
        commit 1
          3 gives 1 (length) first, 32 cached
        submit 4 A40 salt=other
          accepted
        plan
          step 4: 4 prefills [32, 40) and samples, admitted to slot 0 with 32 cached
        """,
    )


def test_a_migrated_request_goes_on() -> None:
    """Output that was emitted elsewhere counts against its limit and is computed like the prompt."""
    check_transcript(
        make_config(steps_in_flight=1),
        """
        submit 1 A20 output_start=15 max=7 stop=3
          accepted
        plan
          step 1: 1 prefills [0, 20) and samples, admitted to slot 0 with 0 cached
        commit 5
          1 gives 5 first, 0 cached
        plan
          step 2: 1 decodes 20
        commit 6
          1 gives 6 (length)
        counts
          blocks 31 free 1 cached 0 active; sequences 0 waiting 0 running; preemptions 0
        """,
    )


def test_the_last_prompt_token_is_always_computed() -> None:
    """There must be something to sample from."""
    check_transcript(
        make_config(steps_in_flight=1),
        """
        submit 1 A32
          accepted
        plan
          step 1: 1 prefills [0, 32) and samples, admitted to slot 0 with 0 cached
        commit 1
          1 gives 1 (length) first, 0 cached
        submit 2 A32
          accepted
        plan
          step 2: 2 prefills [16, 32) and samples, admitted to slot 0 with 16 cached
        commit 1
          2 gives 1 (length) first, 16 cached
        submit 3 A33
          accepted
        plan
          step 3: 3 prefills [32, 33) and samples, admitted to slot 0 with 32 cached
        commit 1
          3 gives 1 (length) first, 32 cached
        submit 4 A16
          accepted
        plan
          step 4: 4 prefills [0, 16) and samples, admitted to slot 0 with 0 cached
        """,
    )


def test_output_becomes_cache() -> None:
    """A decoded block is sealed when it is full: the next turn finds prompt and answer."""
    check_transcript(
        make_config(steps_in_flight=1),
        """
        submit 1 A30 max=4
          accepted
        plan
          step 1: 1 prefills [0, 30) and samples, admitted to slot 0 with 0 cached
        commit 101
          1 gives 101 first, 0 cached
        plan
          step 2: 1 decodes 30
        commit 102
          1 gives 102
        plan
          step 3: 1 decodes 31
        commit 103
          1 gives 103
        plan
          step 4: 1 decodes 32
        commit 104
          1 gives 104 (length)
        counts
          blocks 30 free 2 cached 0 active; sequences 0 waiting 0 running; preemptions 0
        """,
    )


def test_the_context_limits_the_output() -> None:
    """tokens_max may be anything."""
    check_transcript(
        make_config(context_tokens=34, steps_in_flight=1),
        """
        submit 1 A32 max=1000000
          accepted
        plan
          step 1: 1 prefills [0, 32) and samples, admitted to slot 0 with 0 cached
        commit 1
          1 gives 1 first, 0 cached
        plan
          step 2: 1 decodes 32
        commit 2
          1 gives 2 (length)
        plan
          nothing
        """,
    )


def test_tables_stand_while_steps_run() -> None:
    """A slot is not given to another before the last launched step that held it is committed."""
    check_transcript(
        make_config(slots=1),
        """
        submit 1 A40 max=9
          accepted
        submit 2 B20
          accepted
        plan
          step 1: 1 prefills [0, 40) and samples, admitted to slot 0 with 0 cached
        table 0 3
          0 1 2
        plan
          step 2: 1 decodes 40 from feedback
        abort 1
          ABORTED
        plan
          nothing
        commit 1
          no tokens
        plan
          nothing
        table 0 3
          0 1 2
        commit 2
          no tokens
        plan
          step 3: 2 prefills [0, 20) and samples, admitted to slot 0 with 0 cached
        table 0 2
          3 4
        """,
    )
