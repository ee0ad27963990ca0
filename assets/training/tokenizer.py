"""The bundled tokenizer: byte-level BPE, every digit a token, trained on the toy world.

    python -m tokenrelay.assets.training.tokenizer

Words carry their leading space; punctuation and words never merge, so that `plan` in `docs/plan.md` and in
`"plan.md"` is the same token and copying stays easy. A line feed is a token by itself, so that a prompt's last one
never merges with what follows. Markers of the chat template are added tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenrelay.assets.training import pools, template, world

FOLDER = Path(__file__).resolve().parents[1] / "tokenrelay-tiny"
VOCABULARY = 2304
WORD_REPEATS = 500  # how often each word that will be copied is added in both its forms, so that both become tokens
CONTEXT_TOKENS = 8192
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
PIECES = r"\n| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"


def train(dialogues: int = 12_000) -> Tokenizer:
    """The tokenizer of the corpus' first dialogues. Ids: bytes and merges, then `SPECIAL`, then `TAGS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(TAGS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    markers = [*SPECIAL, *TAGS]

    def texts() -> list[str]:
        found = []
        for index in range(dialogues):
            dialogue = world.write_train(index)
            text = template.render(dialogue.messages, dialogue.tools or None)
            for marker in markers:
                text = text.replace(marker, "\n")
            found.append(text)
        return found + [f'"{word}" {word}' for word in pools.COPIED for _ in range(WORD_REPEATS)]

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(text)): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": text in SPECIAL,
        }
        for text in [*SPECIAL, *TAGS]
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": CONTEXT_TOKENS,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
        "chat_template": template.TEMPLATE.read_text(encoding="utf-8"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def load(folder: Path = FOLDER) -> Tokenizer:
    """The tokenizer in `folder`."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be there."""
    found: int | None = tokenizer.token_to_id(token)
    assert found is not None, f"no token {token}"
    return found


if __name__ == "__main__":
    save(train(), FOLDER)
