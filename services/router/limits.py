"""Bounds of what one request may ask. An operator's limits are in config.py; these are the API's, and docs/api.md
lists them.
"""

from __future__ import annotations

# -- counts -----------------------------------------------------------------------------------------------------------
CHOICES_MAX = 128  # sequences of one HTTP request: prompts x n, as OpenAI bounds n
MESSAGES_MAX = 16_384
TOOLS_MAX = 1_024
TOOL_NAME_CHARS_MAX = 256
STOPS_MAX = 32  # OpenAI takes 4, others any number; each costs automaton states
STOP_CHARS_MAX = 256
STOP_TOKEN_IDS_MAX = 128
LOGIT_BIAS_MAX = 1_024
TOP_LOGPROBS_MAX = 20
PROMPTS_MAX = 128
TEMPLATE_KWARGS_MAX = 32
JSON_DEPTH_MAX = 64  # of the parts that are free-form: tools, chat_template_kwargs
GRAMMAR_CHARS_MAX = 1 << 20  # of a schema, a regex, a grammar
CHOICE_MAX = 10_000  # texts to choose an answer from
INTEGER_BITS_MAX = 1_024  # free-form integers: Python refuses to print those of more than 4,300 digits
REQUEST_ID_CHARS_MAX = 128
CACHE_SALT_BYTES_MAX = 256

# -- values: (minimum, maximum), both inclusive -----------------------------------------------------------------------
TEMPERATURE = (0.0, 2.0)
PENALTY = (-2.0, 2.0)
REPETITION_PENALTY = (0.01, 10.0)
LOGIT_BIAS = (-100.0, 100.0)
TOP_K_MAX = 1 << 20
SEED = (-(1 << 63), (1 << 64) - 1)  # negative ones are taken modulo 2^64
PRIORITY = (-1_000, 1_000)
TPS_FLOOR = (1, 1_000)
EXPECTED_TOKENS = (1, 1 << 20)
THINKING_BUDGET = (0, 1 << 20)
TOKEN_ID_MAX = (1 << 32) - 1
