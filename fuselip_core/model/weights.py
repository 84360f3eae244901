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

from fuselip_core.errors import FuselipError

Shape = tuple[int, ...]
NAMED = 4  # names told of each kind of misfit
SAFE_FILES = ("model.safetensors", "open_clip_model.safetensors")
TORCH_FILES = ("pytorch_model.bin", "open_clip_pytorch_model.bin")


class CheckpointError(FuselipError):
    """A checkpoint that is unreadable or belongs to a model of other dimensions."""


def read_weights(folder: Path) -> dict[str, Tensor]:
    """State dict, on the CPU, of a checkpoint folder, from safetensors where there is such a file.

    Raises CheckpointError where there is none or it is damaged. Pickled files are read as tensors only, never run.
    """
    for name in (*SAFE_FILES, *TORCH_FILES):
        path = folder / name
        if not path.is_file():
            continue
        try:
            if name in SAFE_FILES:
                return safetensors.torch.load_file(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path} is no readable checkpoint ({reason}); fetch it again") from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointError(f"{path} holds no state dict (names and tensors); give a checkpoint as published")
        return state
    raise CheckpointError(f"{folder} holds no weights; expected one of {', '.join((*SAFE_FILES, *TORCH_FILES))}")


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
        return (model, info) if wants_info else model

    @classmethod
    def _check_folder(cls, folder: Path, config: Any) -> None:
        """Looks at a folder's header alone, so that a misfit ends in one sentence before transformers reports it."""
        path = folder / SAFE_FILES[0]
        if not path.is_file():
            return
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
