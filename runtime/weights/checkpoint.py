"""A checkpoint folder: its configuration, its safetensors files, and where each tensor lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tokenrelay.base.errors import CheckpointError
from tokenrelay.runtime.models.fields import Fields, read_json
from tokenrelay.runtime.weights.safetensors import Entry, SafetensorsFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """An open folder. `files` in name order; `where` maps each tensor to its file. Close it, or use it in a `with`."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise CheckpointError(f"the model folder {folder} {what}", file=str(folder))
        self.folder = folder
        self.config = Fields.read(folder / "config.json")
        self.files: list[SafetensorsFile] = []
        self.where: dict[str, SafetensorsFile] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def entry(self, name: str) -> Entry:
        """Where and what tensor `name` is."""
        return self.where[name].entries[name]

    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a reply: of generation_config.json where it names any, else of config.json."""
        path = self.folder / "generation_config.json"
        generation = Fields.read(path).integers("eos_token_id") if path.exists() else ()
        return generation or self.config.integers("eos_token_id")

    def close(self) -> None:
        """Unmap every file."""
        for file in self.files:
            file.close()
        self.files.clear()

    def _open(self) -> None:
        index = self.folder / INDEX
        if (self.folder / SINGLE).exists():
            expected: Mapping[str, str] = {}
            names = [SINGLE]
        elif index.exists():
            expected = _weight_map(index)
            names = sorted(set(expected.values()))
        else:
            old = any(self.folder.glob("*.bin"))
            hint = "; it holds PyTorch .bin files, convert them to safetensors" if old else ""
            raise CheckpointError(f"{self.folder} holds neither {SINGLE} nor {INDEX}{hint}", file=str(self.folder))
        for name in names:
            if not (self.folder / name).exists():
                raise CheckpointError(
                    f"{self.folder / name} is missing: {index.name} says it holds "
                    f"{sum(file == name for file in expected.values())} tensors",
                    file=str(self.folder / name),
                )
        for name in names:
            file = SafetensorsFile(self.folder / name)
            self.files.append(file)
            for tensor in file.entries:
                if tensor in self.where:
                    both = f"{self.where[tensor].path.name} and {name}"
                    raise CheckpointError(f"{self.folder}: {tensor} is in both {both}", file=name, tensor=tensor)
                self.where[tensor] = file
        for tensor, name in expected.items():
            if tensor not in self.where:
                path = self.folder / name
                raise CheckpointError(
                    f"{path} lacks {tensor}, which {INDEX} places there", file=str(path), tensor=tensor
                )


def _weight_map(index: Path) -> Mapping[str, str]:
    values = read_json(index).get("weight_map")
    if not isinstance(values, dict) or not values:
        raise CheckpointError(f"{index}: weight_map is missing or empty", file=str(index))
    for tensor, name in values.items():
        # A plain file name: an index must not reach outside its folder.
        if not isinstance(name, str) or not name or Path(name).name != name:
            message = f"{index}: weight_map places {tensor} in {name!r}, expected the name of a file in this folder"
            raise CheckpointError(message, file=str(index), tensor=tensor)
    return values
