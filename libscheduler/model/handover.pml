/* The handover of KV between prefills and decodes over a kvstore: processes, network and faults. What may follow what is
 * not written here: H_* and NEXT_* (the handle), B_* and BNEXT_* (a block) come from libscheduler's constexpr tables,
 * through tokenrelay/libscheduler/promela.py. docs/model-checking.md says what is abstracted, and why.
 *
 * The network: what a process has told another may arrive late, never, twice, or after what was told later. So a message
 * is not taken from a queue: it is there from when it was sent, and whoever hears it may do so at any time and again.
 * Messages of former lives, generations and terms stay on their way for ever; the ledger refuses them, so they show only
 * where a mutation takes that guard away.
 *
 * Time: there is none. A deadline may be over at any moment, so nothing that holds here rests on a timer.
 */

#ifndef PREFILLS
#define PREFILLS 1
#endif
#ifndef DECODES
#define DECODES 1
#endif
#ifndef EXTENTS
#define EXTENTS 2           /* of a block: sealed and read one after the other */
#endif
#define REQUESTS_MAX 4

#define NOWHERE 255
#define MUTATED(guard) (mutation == guard)

byte mutation;              /* 0: the protocol as it is; else the guard that was taken away */
byte forbidden;                 /* 0; else 16 * from + to, a transition that is asserted never to be taken */

/* -- a prefill: the owner, with one block ------------------------------------------------------------------------- */
#define DOWN 0              /* and will come back */
#define UP 1
#define GONE 2

#define KEEP 0
#define WANTS 1             /* its blocks back: an abort, or a deadline */
#define CUT 2               /* it has cut the claimant off from the block's word `cut` and all before */

typedef Prefill {
  byte up;
  byte life;
  byte block;               /* a state of the block machine */
  byte content[EXTENTS];    /* of the block: whose KV it is, a request's number */
  byte filled;              /* extents that are sealed */
  byte word;                /* the generation in memory beside the block; a new life begins with 0 again */
  byte cut;
  byte cut_life[DECODES];   /* lives of decodes that were declared over: cut off from everything */
  byte request;             /* whose KV it makes; 0: none */
  byte generation;          /* of its handle; 0: no name yet */
  byte term;
  byte want;
};
Prefill p[PREFILLS];

/* -- a decode: the claimant, with room for one block ------------------------------------------------------------------ */
#define IDLE 0
#define CLAIMING 1
#define GRANTED 2
#define READY 3             /* it was told that its next extent is sealed */
#define READING 4
#define LANDED 5            /* all of them */
#define VALID 6             /* the generation was the right one after the data had come */
#define STOPPED 7           /* gave up; waits for its own transfer */
#define STOPPED_VALID 8     /* the same, with an Adopt on its way */

#define NO_TRANSFER 0
#define LAUNCHED 1          /* may read the source at any moment */
#define READ 2              /* has read, and will write into the block here */
#define FAILED 3

typedef Decode {
  byte up;
  byte life;
  byte phase;
  byte block;               /* a state of the block machine */
  byte content[EXTENTS];
  byte pulled;              /* extents that have come */
  byte transfer;            /* of the next one */
  byte data;                /* what the transfer has read */
  byte from;                /* the handle's name: record, generation, term; and what it stands for */
  byte generation;
  byte term;
  byte request;
  byte word;
  byte owner_life;
  byte seen[PREFILLS];      /* the last request of each prefill that this life has claimed */
  bit granted;              /* the answer to its Claim is on its way */
  bit adopted;              /* the answer to its Adopt */
  bit orphan;               /* a transfer that goes on, though its block was given back: in a mutation only */
  byte old_generation;      /* of a handle it had, whose Decline is on its way still; kept where a mutation heeds it */
  byte old_term;
};
Decode d[DECODES];

/* -- the kvstore: one record for each prefill ------------------------------------------------------------------------- */
typedef Record {
  byte state;
  byte generation;
  byte term;
  byte owner;               /* its life */
  byte claimant;            /* which decode, plus 1 */
  byte claimant_life;
  byte request;
  byte word;
  byte sealed;              /* extents */
};
Record r[PREFILLS];
byte term = 1;
byte over_prefill[PREFILLS]; /* lives up to this one are over */
byte over_decode[DECODES];
bit recovering;              /* a new reign decides nothing until it has heard its members */
bit heard_prefill[PREFILLS];
bit heard_decode[DECODES];
byte deposed[PREFILLS];      /* the states that a former kvstore still believes in; only a mutation lets it act */

/* -- bookkeeping ------------------------------------------------------------------------------------------------------ */
byte kept[REQUESTS_MAX + 1];       /* which decode has it, plus 1, as long as that life lasts */
byte requests;               /* started, of these: */
byte requests_max;
byte faults;                 /* left, in all; and of each kind: */
byte prefill_deaths = 1;
byte decode_deaths = 1;
byte takeovers = 1;          /* the kvstore dies, the next one reads what was stored */
byte losses = 1;             /* the kvstore dies, and nothing was stored */
byte suspicions = 1;         /* somebody alive is declared dead */
hidden byte x;

/* Never set: they name in an error message what an assertion says. */
hidden byte law_2_reused_while_a_reader_may_be_alive;
hidden byte law_2_reused_while_a_writer_may_be_alive;
hidden byte law_4_another_text;
hidden byte law_4_adopted_before_it_was_sealed;
hidden byte law_5_decoded_twice;
hidden byte law_5_something_is_left;

/* A transfer of decode j reads the block of prefill i, in its present life, and was not cut off. */
#define READS(j, i) (d[j].transfer == LAUNCHED && d[j].from == i && d[j].owner_life == p[i].life && d[j].word > p[i].cut && \
  d[j].life > p[i].cut_life[j])

/* The memory of prefill i answers, at its address: whoever lives there now. */
#define REACHABLE(j) (p[d[j].from].up == UP && !(d[j].owner_life == p[d[j].from].life && \
  (d[j].word <= p[d[j].from].cut || d[j].life <= p[d[j].from].cut_life[j])))

/* What prefill i says of its handle counts: the name is the record's, and the life is not over. */
#define OWNS(i) (!recovering && p[i].up == UP && p[i].generation != 0 && p[i].generation == r[i].generation \
  && p[i].term == r[i].term && p[i].life == r[i].owner && p[i].life > over_prefill[i])

/* Decode j has the record's name. */
#define NAMES(j, i) (d[j].phase != IDLE && d[j].from == i && d[j].generation == r[i].generation && d[j].term == r[i].term)
#define CLAIMED_BY(j, i) (r[i].claimant == j + 1 && r[i].claimant_life == d[j].life)
#define SPEAKS(j, i) (!recovering && d[j].up == UP && d[j].life > over_decode[j] && (CLAIMED_BY(j, i) || MUTATED(NO_CLAIMANT_CHECK)))

/* Nothing of it touches the record's block, nor will: it has another handle or none, or its transfer has ended. */
#define STOPS(j) ((d[j].phase == STOPPED || d[j].phase == STOPPED_VALID) \
  && (d[j].transfer == NO_TRANSFER || MUTATED(ANSWER_WHILE_READING)))
#define GAVE_UP(j, i) (!NAMES(j, i) || STOPS(j))

#define FREED(state) (state == H_Released || state == H_Reclaimed || state == H_Fenced)
#define OPENED(i) (r[i].state != H_Unused && !H_ENDS(r[i].state))

/* The ledger moves record i. */
inline move(i, next) {
  assert(forbidden == 0 || forbidden != 16 * r[i].state + next);
  r[i].state = next
}

inline settle(i) {           /* its owner has the block back already, or never heard the handle's name */
  if
  :: H_TOUCHED(r[i].state) -> move(i, NEXT_Fence(r[i].state))
  :: r[i].state == H_Adopted -> move(i, NEXT_Release(r[i].state))
  :: else -> move(i, NEXT_Reclaim(r[i].state))
  fi
}

/* -- prefill ------------------------------------------------------------------------------------------------------------ */
inline give_back(i) {
  p[i].block = (BNEXT_LandLast(p[i].block) != NOWHERE -> BNEXT_LandLast(p[i].block) : p[i].block);  /* its step is awaited */
  p[i].block = (BNEXT_Discard(p[i].block) != NOWHERE -> BNEXT_Discard(p[i].block) : BNEXT_Release(p[i].block));
  assert(p[i].block == B_Free);
  x = 0;
  do                         /* it has heard who is over before it heard that its handle is */
  :: x < DECODES ->
     p[i].cut_life[x] = (over_decode[x] > p[i].cut_life[x] && !MUTATED(NO_CUT_OF_THE_DEAD) -> over_decode[x] : p[i].cut_life[x]);
     x++
  :: else -> break
  od;
  p[i].request = 0; p[i].filled = 0; p[i].generation = 0; p[i].term = 0; p[i].want = KEEP
}

inline forget_prefill(i) {   /* the memory of a life that is over */
  p[i].block = B_Free; p[i].filled = 0; p[i].word = 0; p[i].cut = 0;
  x = 0;
  do
  :: x < EXTENTS -> p[i].content[x] = 0; x++
  :: else -> break
  od;
  x = 0;
  do
  :: x < DECODES -> p[i].cut_life[x] = 0; x++
  :: else -> break
  od;
  p[i].request = 0; p[i].generation = 0; p[i].term = 0; p[i].want = KEEP
}

proctype prefill(byte i) {
end:
  do
  :: d_step { p[i].up == UP && p[i].request == 0 && requests < requests_max && BNEXT_Take(p[i].block) != NOWHERE ->
       printf("prefill %d life %d takes its block for request %d\n", i, p[i].life, requests + 1);
       x = 0;
       do
       :: x < DECODES -> assert(law_2_reused_while_a_reader_may_be_alive || !READS(x, i)); x++
       :: else -> break
       od;
       p[i].block = BNEXT_Take(p[i].block); p[i].block = BNEXT_Launch(p[i].block); p[i].filled = 0; p[i].word++;
       requests++; p[i].request = requests }
  :: d_step { p[i].up == UP && p[i].request != 0 && p[i].filled < EXTENTS ->
       printf("prefill %d fills and seals extent %d\n", i, p[i].filled);
       p[i].content[p[i].filled] = p[i].request; p[i].filled++;
       if
       :: p[i].filled == EXTENTS -> p[i].block = BNEXT_LandLast(p[i].block); p[i].block = BNEXT_Seal(p[i].block)
       :: else
       fi }
  :: d_step { p[i].up == UP && p[i].request != 0 && p[i].generation == 0 &&
         r[i].request == p[i].request && r[i].owner == p[i].life ->
       printf("prefill %d learns its handle's name\n", i);
       p[i].generation = r[i].generation; p[i].term = r[i].term }
  :: d_step { p[i].up == UP && p[i].generation != 0 && p[i].want == KEEP ->
       printf("prefill %d wants its block back\n", i);
       p[i].want = WANTS }
  :: d_step { OWNS(i) && p[i].want != CUT && r[i].state == H_Quarantined ->
       printf("prefill %d cuts the claimant off\n", i);
       p[i].want = CUT; p[i].cut = p[i].word }
  :: d_step { OWNS(i) && FREED(r[i].state) ->
       printf("prefill %d learns that its handle is over: the block is free\n", i);
       give_back(i) }
  :: d_step { !recovering && p[i].up == UP && p[i].request != r[i].request && OPENED(i) && r[i].owner == p[i].life ->
       printf("prefill %d is told of a handle that it does not know: it is over\n", i);
       settle(i) }
  :: d_step { p[i].up == UP && !recovering && p[i].generation != 0 &&
         !(r[i].generation == p[i].generation && r[i].term == p[i].term) ->
       printf("prefill %d: the kvstore does not know the handle; claimants are cut off, the block is free\n", i);
       if
       :: !MUTATED(NO_CUT_WHEN_FORGOTTEN) -> p[i].cut = p[i].word
       :: else
       fi;
       give_back(i) }
  :: d_step { p[i].up == UP && p[i].life <= over_prefill[i] ->
       printf("prefill %d learns that its life is over, and begins another\n", i);
       forget_prefill(i);
       over_prefill[i] = p[i].life; p[i].life++ }
  :: d_step { MUTATED(FREE_WHEN_LOST) && p[i].up == UP && p[i].generation != 0 && r[i].state == H_Lost &&
         r[i].owner == p[i].life ->
       printf("prefill %d frees what is lost, and goes on\n", i);
       give_back(i); over_prefill[i] = p[i].life - 1 }
  :: d_step { p[i].up == UP && faults > 0 && prefill_deaths > 0 ->
       printf("prefill %d dies\n", i);
       faults--; prefill_deaths--; forget_prefill(i); p[i].up = DOWN }
  :: d_step { p[i].up == DOWN ->
       printf("prefill %d starts again, at the same address\n", i);
       p[i].up = UP; p[i].life++ }
  :: d_step { p[i].up == DOWN -> p[i].up = GONE }
  od
}

/* -- decode ------------------------------------------------------------------------------------------------------------- */
inline forget_content(j) {   /* nothing depends on it any more */
  x = 0;
  do
  :: x < EXTENTS -> d[j].content[x] = 0; x++
  :: else -> break
  od;
  x = 0                      /* a loop cannot be the end of a d_step */
}

inline forget_decode(j) {
  d[j].phase = IDLE; d[j].block = B_Free; d[j].pulled = 0; d[j].transfer = NO_TRANSFER; d[j].data = 0; d[j].from = 0;
  d[j].generation = 0; d[j].term = 0; d[j].request = 0; d[j].word = 0; d[j].owner_life = 0;
  d[j].granted = 0; d[j].adopted = 0; d[j].orphan = 0; d[j].old_generation = 0; d[j].old_term = 0;
  x = 0;
  do
  :: x < PREFILLS -> d[j].seen[x] = 0; x++
  :: else -> break
  od;
  x = 1;
  do
  :: x <= REQUESTS_MAX -> kept[x] = (kept[x] == j + 1 -> 0 : kept[x]); x++
  :: else -> break
  od;
  forget_content(j)
}

inline rest(j) {             /* the handle is done with, and its block is free */
  if
  :: MUTATED(NO_GENERATION_CHECK) || MUTATED(NO_TERM_CHECK) ->
     d[j].old_generation = d[j].generation; d[j].old_term = d[j].term
  :: else
  fi;
  d[j].phase = IDLE; d[j].pulled = 0; d[j].from = 0; d[j].generation = 0; d[j].term = 0; d[j].request = 0; d[j].word = 0;
  d[j].owner_life = 0; d[j].granted = 0; d[j].adopted = 0;
  forget_content(j)
}

inline land(j) {             /* the transfer is over: its writer writes no more */
  d[j].block = BNEXT_LandLast(d[j].block);
  d[j].transfer = NO_TRANSFER; d[j].data = 0;
  if
  :: d[j].block == B_Free -> rest(j)
  :: else
  fi
}

proctype claim_of(byte j; byte i) {  /* decode j hears of prefill i's handle */
end:
  do
  :: d_step { d[j].up == UP && d[j].phase == IDLE && p[i].up == UP && p[i].generation != 0 &&
         d[j].seen[i] < p[i].request && BNEXT_Take(d[j].block) != NOWHERE ->
       printf("decode %d life %d makes room and claims the handle of request %d\n", j, d[j].life, p[i].request);
       assert(law_2_reused_while_a_writer_may_be_alive || (d[j].transfer == NO_TRANSFER && !d[j].orphan));
       d[j].block = BNEXT_Take(d[j].block); d[j].phase = CLAIMING; d[j].from = i;
       d[j].generation = p[i].generation; d[j].term = p[i].term; d[j].request = p[i].request; d[j].word = p[i].word;
       d[j].owner_life = p[i].life; d[j].seen[i] = p[i].request }
  od
}

proctype decode(byte j) {
end:
  do
  :: d_step { d[j].up == UP && d[j].phase == CLAIMING && d[j].granted ->
       printf("decode %d learns that its claim was granted\n", j);
       d[j].phase = GRANTED; d[j].granted = 0 }
  :: d_step { d[j].up == UP && d[j].phase == GRANTED &&
         (MUTATED(READ_UNSEALED) || (p[d[j].from].up == UP && p[d[j].from].life == d[j].owner_life &&
             p[d[j].from].word == d[j].word && p[d[j].from].filled > d[j].pulled)) ->
       printf("decode %d learns that extent %d is sealed\n", j, d[j].pulled);
       d[j].phase = READY }
  :: d_step { d[j].up == UP && d[j].phase == READY ->
       printf("decode %d launches the transfer\n", j);
       d[j].phase = READING; d[j].block = BNEXT_Launch(d[j].block); d[j].transfer = LAUNCHED }
  :: d_step { d[j].up == UP && d[j].transfer == LAUNCHED ->
       if
       :: REACHABLE(j) -> d[j].transfer = READ; d[j].data = p[d[j].from].content[d[j].pulled]
       :: else -> d[j].transfer = FAILED
       fi;
       printf("decode %d: the transfer reads %d (transfer %d)\n", j, d[j].data, d[j].transfer) }
  :: d_step { d[j].up == UP && d[j].transfer == READ && d[j].block != B_Free ->
       printf("decode %d: the transfer lands\n", j);
       d[j].content[d[j].pulled] = d[j].data; d[j].pulled++;
       if
       :: d[j].phase == READING && d[j].pulled < EXTENTS -> d[j].phase = GRANTED
       :: d[j].phase == READING && d[j].pulled == EXTENTS -> d[j].phase = LANDED
       :: else
       fi;
       land(j) }
  :: d_step { d[j].up == UP && d[j].transfer == FAILED && d[j].block != B_Free ->
       printf("decode %d: the transfer failed\n", j);
       if
       :: d[j].phase == READING -> d[j].phase = STOPPED
       :: else
       fi;
       land(j) }
  :: d_step { d[j].up == UP && d[j].phase == LANDED ->
       if
       :: MUTATED(NO_VALIDATION) || (REACHABLE(j) && p[d[j].from].word == d[j].word &&
            (p[d[j].from].life == d[j].owner_life || MUTATED(VALIDATE_WITHOUT_LIFE))) -> d[j].phase = VALID
       :: else -> d[j].phase = STOPPED
       fi;
       printf("decode %d validates what it read: phase %d\n", j, d[j].phase) }
  :: d_step { !recovering && d[j].up == UP && d[j].phase == VALID && !d[j].adopted && NAMES(j, d[j].from) &&
         CLAIMED_BY(j, d[j].from) && (r[d[j].from].state == H_Adopted || r[d[j].from].state == H_Released) ->
       printf("decode %d asks, and hears that it has adopted\n", j);
       d[j].adopted = 1 }
  :: d_step { d[j].up == UP && d[j].phase == VALID && d[j].adopted ->
       printf("decode %d learns of its adoption and decodes request %d\n", j, d[j].request);
       x = 0;
       do
       :: x < EXTENTS -> assert(law_4_another_text || d[j].content[x] == d[j].request); x++
       :: else -> break
       od;
       x = kept[d[j].request];                            /* whoever was declared over is not listened to any more */
       assert(law_5_decoded_twice || x == 0 || d[x - 1].life <= over_decode[x - 1]);
       kept[d[j].request] = j + 1;
       d[j].block = BNEXT_Release(d[j].block); rest(j) }
  :: d_step { d[j].up == UP && d[j].phase >= CLAIMING && d[j].phase <= VALID ->
       printf("decode %d gives up\n", j);
       if
       :: d[j].phase == READING -> d[j].block = BNEXT_Abandon(d[j].block)
       :: else
       fi;
       d[j].phase = (d[j].phase == VALID -> STOPPED_VALID : STOPPED) }
  :: d_step { d[j].up == UP && (d[j].phase == STOPPED || d[j].phase == STOPPED_VALID) &&
         (d[j].transfer == NO_TRANSFER || d[j].block == B_Free) ->
       printf("decode %d gives its block back\n", j);
       if
       :: d[j].transfer != NO_TRANSFER -> d[j].orphan = 1; d[j].transfer = NO_TRANSFER; d[j].data = 0
       :: else -> d[j].block = BNEXT_Release(d[j].block)
       fi;
       assert(d[j].block == B_Free);
       rest(j) }
  :: d_step { d[j].up == UP && d[j].life <= over_decode[j] ->
       printf("decode %d learns that its life is over, and begins another\n", j);
       forget_decode(j); d[j].life++ }
  :: d_step { d[j].up == UP && d[j].life > over_decode[j] && faults > 0 && suspicions > 0 ->
       printf("kvstore: decode %d is declared dead, though it lives\n", j);
       faults--; suspicions--; over_decode[j] = d[j].life }
  :: d_step { d[j].up == UP && faults > 0 && decode_deaths > 0 ->
       printf("decode %d dies\n", j);
       faults--; decode_deaths--; forget_decode(j); d[j].up = DOWN }
  :: d_step { d[j].up == DOWN ->
       printf("decode %d starts again\n", j);
       d[j].up = UP; d[j].life++ }
  :: d_step { d[j].up == DOWN -> d[j].up = GONE }
  od
}

/* -- the kvstore: each event, heard at any time after it was sent --------------------------------------------------------- */
proctype owner_events(byte i) {
end:
  do
  :: d_step { !recovering && p[i].up == UP && p[i].request != 0 && p[i].generation == 0 && p[i].life > over_prefill[i] &&
         !OPENED(i) &&
         NEXT_Reserve(H_Unused) != NOWHERE ->
       printf("ledger: Reserve for request %d\n", p[i].request);
       move(i, NEXT_Reserve(H_Unused));
       r[i].generation++; r[i].term = term; r[i].owner = p[i].life; r[i].claimant = 0; r[i].claimant_life = 0;
       r[i].request = p[i].request; r[i].word = p[i].word; r[i].sealed = 0 }
  :: d_step { OWNS(i) && NEXT_Offer(r[i].state) != NOWHERE ->
       printf("ledger: Offer\n");
       move(i, NEXT_Offer(r[i].state)) }
  :: d_step { OWNS(i) && p[i].filled > r[i].sealed && NEXT_Seal(r[i].state) != NOWHERE ->
       printf("ledger: Seal of %d extents\n", p[i].filled);
       move(i, NEXT_Seal(r[i].state)); r[i].sealed = p[i].filled }
  :: d_step { OWNS(i) && NEXT_Release(r[i].state) != NOWHERE ->
       printf("ledger: Release\n");
       move(i, NEXT_Release(r[i].state)) }
  :: d_step { OWNS(i) && p[i].want != KEEP && NEXT_Reclaim(r[i].state) != NOWHERE ->
       printf("ledger: Reclaim\n");
       move(i, NEXT_Reclaim(r[i].state)) }
  :: d_step { OWNS(i) && p[i].want != KEEP && NEXT_Quarantine(r[i].state) != NOWHERE ->
       printf("ledger: Quarantine\n");
       move(i, NEXT_Quarantine(r[i].state)) }
  :: d_step { OWNS(i) && (p[i].want == CUT || MUTATED(FENCE_WITHOUT_CUTTING)) && NEXT_Fence(r[i].state) != NOWHERE ->
       printf("ledger: Fence\n");
       move(i, NEXT_Fence(r[i].state)) }
  od
}

proctype claimant_events(byte i; byte j) {
end:
  do
  :: d_step { !recovering && d[j].up == UP && d[j].life > over_decode[j] && NAMES(j, i) && NEXT_Claim(r[i].state) != NOWHERE ->
       printf("ledger: Claim by decode %d\n", j);
       move(i, NEXT_Claim(r[i].state)); r[i].claimant = j + 1; r[i].claimant_life = d[j].life;
       d[j].granted = (d[j].phase == CLAIMING) }
  :: d_step { SPEAKS(j, i) && NAMES(j, i) && d[j].phase == READING && NEXT_Transfer(r[i].state) != NOWHERE &&
         NEXT_Transfer(r[i].state) != r[i].state ->
       printf("ledger: Transfer\n");
       move(i, NEXT_Transfer(r[i].state)) }
  :: d_step { SPEAKS(j, i) && NAMES(j, i) && (d[j].phase == VALID || d[j].phase == STOPPED_VALID) &&
         (r[i].sealed == EXTENTS || MUTATED(ADOPT_UNSEALED)) && NEXT_Adopt(r[i].state) != NOWHERE ->
       printf("ledger: Adopt\n");
       assert(law_4_adopted_before_it_was_sealed || r[i].sealed == EXTENTS);
       move(i, NEXT_Adopt(r[i].state));
       d[j].adopted = (d[j].phase == VALID) }
  :: d_step { SPEAKS(j, i) && GAVE_UP(j, i) && NEXT_Decline(r[i].state) != NOWHERE ->
       printf("ledger: Decline by decode %d\n", j);
       move(i, NEXT_Decline(r[i].state)) }
  :: d_step { SPEAKS(j, i) && GAVE_UP(j, i) && NEXT_Acknowledge(r[i].state) != NOWHERE ->
       printf("ledger: Acknowledge by decode %d\n", j);
       move(i, NEXT_Acknowledge(r[i].state)) }
  :: d_step { !recovering && d[j].old_generation != 0 && CLAIMED_BY(j, i) && NEXT_Decline(r[i].state) != NOWHERE &&
         (d[j].old_generation == r[i].generation || MUTATED(NO_GENERATION_CHECK)) &&
         (d[j].old_term == r[i].term || MUTATED(NO_TERM_CHECK)) &&
         !(d[j].old_generation == r[i].generation && d[j].old_term == r[i].term) ->
       printf("ledger: a Decline of decode %d for a handle it had before\n", j);
       move(i, NEXT_Decline(r[i].state)) }
  od
}

proctype deadlines(byte i) {
end:
  do
  :: d_step { !recovering && NEXT_Expire(r[i].state) != NOWHERE ->
       printf("ledger: Expire\n");
       move(i, NEXT_Expire(r[i].state)) }
  :: d_step { !recovering && NEXT_Lose(r[i].state) != NOWHERE && r[i].owner <= over_prefill[i] ->
       printf("ledger: Lose\n");
       move(i, NEXT_Lose(r[i].state)) }
  :: d_step { p[i].up != UP && OPENED(i) && p[i].life > over_prefill[i] ->
       printf("kvstore: prefill %d is dead\n", i);
       over_prefill[i] = p[i].life }
  :: d_step { p[i].up == UP && p[i].life > over_prefill[i] && faults > 0 && suspicions > 0 ->
       printf("kvstore: prefill %d is declared dead, though it lives\n", i);
       faults--; suspicions--; over_prefill[i] = p[i].life }
  :: d_step { p[i].up == UP && over_prefill[i] < p[i].life - 1 ->
       printf("kvstore: prefill %d joins again\n", i);
       over_prefill[i] = p[i].life - 1 }
  :: d_step { MUTATED(OLD_KVSTORE_ANSWERS) && p[i].up == UP && p[i].generation != 0 && p[i].want != KEEP &&
         deposed[i] != H_Unused && NEXT_Reclaim(deposed[i]) != NOWHERE ->
       printf("the former kvstore, which believes in state %d, answers a Reclaim\n", deposed[i]);
       deposed[i] = H_Unused; give_back(i) }
  od
}

/* What the next kvstore finds written down of record i: how it stands, or an earlier state on its way there. */
inline find_written(i) {
  if
  :: true                                                  /* all of it */
  :: OPENED(i) -> forget_record(i)                         /* not even its name */
  :: OPENED(i) && r[i].state != H_Reserved -> back_to(i, H_Reserved)
  :: r[i].state != H_Unused && r[i].state != H_Reserved && r[i].state != H_Lost -> back_to(i, H_Offered)
  :: r[i].claimant != 0 && r[i].state != H_Claimed && r[i].state != H_Lost -> r[i].state = H_Claimed
  :: r[i].state == H_Fenced || (r[i].state == H_Returned || r[i].state == H_Reclaimed) && r[i].claimant != 0 ->
     r[i].state = H_Quarantined
  :: r[i].state == H_Reclaimed && r[i].claimant != 0 -> r[i].state = H_Returned
  :: r[i].state == H_Released -> r[i].state = H_Adopted
  fi
}

inline back_to(i, earlier) {  /* before it was claimed, or all of it sealed */
  r[i].state = earlier; r[i].claimant = 0; r[i].claimant_life = 0; r[i].sealed = 0
}

inline forget_record(i) {
  r[i].state = H_Unused; r[i].generation = 0; r[i].term = 0; r[i].owner = 0; r[i].claimant = 0; r[i].claimant_life = 0;
  r[i].request = 0; r[i].word = 0; r[i].sealed = 0
}

inline depose(i) {
  if
  :: MUTATED(OLD_KVSTORE_ANSWERS) -> deposed[i] = r[i].state
  :: else
  fi
}

/* The members of the former reign tell the next one what they own and what they have claimed; whoever does not is over.
 * Nothing is decided before. (ledger/recovery.py) */
inline interview_prefill(i) {
  printf("kvstore: hears prefill %d\n", i);
  if
  :: p[i].up != UP -> over_prefill[i] = p[i].life
  :: p[i].up == UP && OPENED(i) && r[i].owner == p[i].life &&
     !(p[i].generation == r[i].generation && p[i].term == r[i].term) ->  /* it has its block back, or never heard the name */
     settle(i)
  :: else
  fi;
  heard_prefill[i] = 1
}

#define HOLDS(j, i) (NAMES(j, i) && d[j].phase >= GRANTED && (d[j].phase <= VALID || d[j].transfer != NO_TRANSFER))

inline interview_decode_of(j, i) {
  if
  :: OPENED(i) && kept[r[i].request] == j + 1 && r[i].state != H_Adopted && !MUTATED(FORGET_ADOPTIONS) ->
     r[i].state = H_Adopted; r[i].sealed = EXTENTS; r[i].claimant = j + 1; r[i].claimant_life = d[j].life
  :: HOLDS(j, i) && (r[i].state == H_Reserved || r[i].state == H_Offered) ->
     r[i].state = H_Claimed; r[i].claimant = j + 1; r[i].claimant_life = d[j].life
  :: CLAIMED_BY(j, i) && H_TOUCHED(r[i].state) && (GAVE_UP(j, i) || d[j].phase == CLAIMING) ->
     move(i, NEXT_Decline(r[i].state))
  :: else
  fi
}

inline interview_decode(j) {
  printf("kvstore: hears decode %d\n", j);
  if
  :: d[j].up != UP -> over_decode[j] = d[j].life
  :: else ->
     d[j].granted = 0; d[j].adopted = 0;                  /* answers of the former reign are not heard any more */
     interview_decode_of(j, 0);
#if PREFILLS > 1
     interview_decode_of(j, 1)
#endif
  fi;
  heard_decode[j] = 1
}

proctype interviews() {
end:
  do
  :: d_step { recovering && !heard_prefill[0] -> interview_prefill(0) }
#if PREFILLS > 1
  :: d_step { recovering && !heard_prefill[1] -> interview_prefill(1) }
#endif
  :: d_step { recovering && !heard_decode[0] -> interview_decode(0) }
#if DECODES > 1
  :: d_step { recovering && !heard_decode[1] -> interview_decode(1) }
#endif
  :: d_step { recovering && !heard_decode[0] && d[0].up == UP && faults > 0 && suspicions > 0 ->
       printf("kvstore: hears nothing of decode 0, and declares it dead, though it lives\n");
       faults--; suspicions--; over_decode[0] = d[0].life; heard_decode[0] = 1 }
  :: d_step { recovering && heard_prefill[0] && heard_decode[0] && heard_prefill[PREFILLS - 1] && heard_decode[DECODES - 1] ->
       printf("kvstore: has heard everybody, and decides again\n");
       recovering = 0; heard_prefill[0] = 0; heard_decode[0] = 0; heard_prefill[PREFILLS - 1] = 0; heard_decode[DECODES - 1] = 0 }
  od
}

proctype kvstore() {
end:
  do
  :: atomic { faults > 0 && takeovers > 0 ->
       printf("kvstore: dies; the next one reads what was written down\n");
       faults--; takeovers--; term++; recovering = !MUTATED(NO_INTERVIEWS);
       depose(0); find_written(0);
#if PREFILLS > 1
       depose(1); find_written(1)
#endif
     }
  :: d_step { faults > 0 && losses > 0 ->
       printf("kvstore: dies, and nothing was written down\n");
       faults--; losses--; term++; recovering = 0;
       x = 0;
       do
       :: x < PREFILLS -> forget_record(x); over_prefill[x] = 0; heard_prefill[x] = 0; x++
       :: else -> break
       od;
       x = 0;
       do
       :: x < DECODES -> over_decode[x] = 0; heard_decode[x] = 0; x++
       :: else -> break
       od;
       x = 0 }
  od
}

/* -- law 5: when nothing can happen any more, everything is over and nothing is held ------------------------------------------ */
#define AT_REST(i) (!OPENED(i) && (p[i].up == GONE || (p[i].request == 0 && p[i].block == B_Free)))
#define IDLES(j) (d[j].up == GONE || (d[j].phase == IDLE && d[j].block == B_Free && d[j].transfer == NO_TRANSFER))

proctype audit() {
end:
  d_step { timeout ->
    x = 0;
    do
    :: x < PREFILLS -> assert(law_5_something_is_left || AT_REST(x)); x++
    :: else -> break
    od;
    x = 0;
    do
    :: x < DECODES -> assert(law_5_something_is_left || IDLES(x)); x++
    :: else -> break
    od;
    x = 0 }
}

init {
  byte i, j;
  atomic {
    c_code {  /* what differs between searches of one program; each is constant in a search */
      now.mutation = getenv("MODEL_MUTATION") ? atoi(getenv("MODEL_MUTATION")) : 0;
      now.forbidden = getenv("MODEL_NEVER") ? atoi(getenv("MODEL_NEVER")) : 0;
      now.requests_max = getenv("MODEL_REQUESTS") ? atoi(getenv("MODEL_REQUESTS")) : 2;
      now.faults = getenv("MODEL_FAULTS") ? atoi(getenv("MODEL_FAULTS")) : 1;
    };
    assert(requests_max <= REQUESTS_MAX);
    for (i : 0 .. PREFILLS - 1) {
      p[i].up = UP; p[i].life = 1; p[i].block = B_Free;
      r[i].state = H_Unused; deposed[i] = H_Unused
    }
    for (j : 0 .. DECODES - 1) {
      d[j].up = UP; d[j].life = 1; d[j].block = B_Free
    }
    for (i : 0 .. PREFILLS - 1) {
      run prefill(i); run owner_events(i); run deadlines(i);
      for (j : 0 .. DECODES - 1) { run claim_of(j, i); run claimant_events(i, j) }
    }
    for (j : 0 .. DECODES - 1) { run decode(j) }
    run kvstore(); run interviews();
#ifndef LIVENESS
    run audit()
#endif
  }
}

#ifdef LIVENESS
/* Laws 3 and 5, as what must happen. A run that stops counts as staying for ever where it stopped. */
ltl handles_end { [] (OPENED(0) -> <> !OPENED(0)) }
ltl quarantines_end { [] (r[0].state == H_Quarantined -> <> (r[0].state != H_Quarantined)) }
ltl sources_come_back { [] (p[0].block != B_Free -> <> (p[0].block == B_Free)) }
ltl landings_come_back { [] (d[0].block != B_Free -> <> (d[0].block == B_Free)) }
#endif
