"""Weights that fit a model exactly: nothing missing, nothing left over, every shape the same."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fuselip_core.errors import FuselipError, one_line

Shape = tuple[int, ...]
NAMED = 4  # names told of each kind of misfit
SAFE_FILES = ("model.safetensors", "open_clip_model.safetensors")
LFS_MARK = b"version https://git-lfs"
TORCH_FILES = ("pytorch_model.bin", "open_clip_pytorch_model.bin")


class CheckpointError(FuselipError):
    """A checkpoint that is unreadable or belongs to a model of other dimensions."""


def read_weights(folder: Path, remedy: str = "fetch it again") -> dict[str, Tensor]:
    """State dict, on the CPU, of a checkpoint folder, from safetensors where there is such a file.

    Prefixes that DataParallel and torch.compile put in front of names are taken off. Raises CheckpointError, ending in
    `remedy`, where there is no file, it is damaged, or a value is not finite. Pickled files are read as tensors only.
    """
    path = next((folder / name for name in (*SAFE_FILES, *TORCH_FILES) if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} holds no weights; expected one of {', '.join((*SAFE_FILES, *TORCH_FILES))}")
    refuse_lfs_pointer(path)
    try:
        state = _read_safe(path) if path.name in SAFE_FILES else _read_pickled(path)
    except pickle.UnpicklingError as error:  # whose text advises to run whatever the file holds
        raise CheckpointError(
            f"{path} is no readable checkpoint (damaged, or it holds more than tensors, which is never run); {remedy}"
        ) from error
    except (OSError, RuntimeError, EOFError, safetensors.SafetensorError) as error:
        reason = one_line(error)[:200]
        raise CheckpointError(f"{path} is no readable checkpoint ({reason}); {remedy}") from error
    state = _without_wrappers(state)
    refuse_non_finite(state, path, remedy)
    return state


def _read_safe(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def _read_pickled(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict (names and tensors); give a checkpoint as published")
    return state


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the bare model has them: torch.compile adds `_orig_mod.` anywhere, DataParallel `module.` in front."""
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def refuse_non_finite(state: Mapping[str, Tensor], place: object, remedy: str) -> None:
    """Raises CheckpointError that names the tensors of `state` that hold NaN or infinity, if there are any."""
    bad = sorted(name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all())
    if bad:
        raise CheckpointError(f"{place} holds values that are NaN or infinite in {_named(bad)}; {remedy}")


def refuse_lfs_pointer(path: Path) -> None:
    """Raises CheckpointError where `path` is not the file itself but the pointer that Git LFS leaves in its place."""
    with path.open("rb") as stream:
        if stream.read(len(LFS_MARK)) == LFS_MARK:
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` where it lies")


def refuse_misfits(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], place: object, optional: Collection[str] = ()
) -> None:
    """Raises CheckpointError that names missing, leftover and misshapen tensors, if there are any.

    `optional` names may be missing (tied weights are stored once).
    """
    missing = sorted(name for name in expected if name not in found and name not in optional)
    leftover = sorted(name for name in found if name not in expected)
    misshapen = sorted(
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    )
    kinds = {"missing": missing, "left over": leftover, "of another shape": misshapen}
    parts = [f"{kind}: {_named(names)}" for kind, names in kinds.items() if names]
    if parts:
        raise CheckpointError(f"{place} does not fit the model its configuration describes; {'; '.join(parts)}")


def load_strictly(model: StrictModel, state: Mapping[str, Tensor], place: object) -> None:
    """Gives `model`, which may live on the meta device, exactly the tensors of `state`, as float32.

    Tied weights may be stored once or twice, but then equal. Raises CheckpointError, see `refuse_misfits`.
    """
    tied = model.all_tied_weights_keys
    refuse_misfits(shapes(model.state_dict()), shapes(state), place, optional=tied)
    for name, source in tied.items():
        if name in state and not torch.equal(state[name], state[source]):
            raise CheckpointError(f"{place}: {name} and {source} are one tensor in this model but differ there")
    weights = {name: value.to(torch.float32) for name, value in state.items() if name not in tied}
    model.load_state_dict(weights, strict=False, assign=True)  # checked above; only tied names are absent here
    model.tie_weights()


def shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Name → shape of every tensor."""
    return {name: tuple(value.shape) for name, value in state.items()}


class StrictModel(PreTrainedModel):
    """A transformers model whose `from_pretrained` refuses weights that do not fit, instead of warning."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """As in transformers; raises CheckpointError that names what does not fit."""
        wants_info = options.pop("output_loading_info", False)
        cls._check_folder(Path(pretrained_model_name_or_path), options.get("config"))
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **options)
        model, info = loaded
        expected = shapes(model.state_dict())
        found = {name: shape for name, shape in expected.items() if name not in info["missing_keys"]}
        found |= dict.fromkeys(info["unexpected_keys"], ())
        found |= {name: tuple(stored) for name, stored, _ in info["mismatched_keys"]}
        refuse_misfits(expected, found, pretrained_model_name_or_path, optional=model.all_tied_weights_keys)
        refuse_non_finite(model.state_dict(), pretrained_model_name_or_path, "fetch it again")
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As in transformers; raises CheckpointError for weights that are not finite, before anything is written."""
        refuse_non_finite(self.state_dict(), "the model", "it is not saved; train again with a lower learning rate")
        super().save_pretrained(save_directory, *args, **options)

    @classmethod
    def _check_folder(cls, folder: Path, config: Any) -> None:
        """Looks at a folder's header alone, so that a misfit ends in one sentence before transformers reports it."""
        path = folder / SAFE_FILES[0]
        if not path.is_file():
            return
        refuse_lfs_pointer(path)
        if config is None:
            config = cls.config_class.from_pretrained(folder)  # type: ignore[union-attr]
        with torch.device("meta"):
            model = cls(config)
        try:
            with safetensors.safe_open(path, framework="pt") as stream:
                found = {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path} is no readable checkpoint ({error}); save or fetch it again") from error
        refuse_misfits(shapes(model.state_dict()), found, path, optional=model.all_tied_weights_keys)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
