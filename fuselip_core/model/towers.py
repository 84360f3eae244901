"""open_clip's towers for the late-fusion baselines, in which nothing is computed that nobody reads.

open_clip builds them, so that names, shapes and first weights are as published. Their blocks are
then this project's, which compute the same from the same weights, but also read packed sequences: so texts cost their
tokens and no padding, equal texts cost one, and the last block ends in the one place that is read.

Legend: B sequences, L tokens, N different texts, R places read, W width, S pixels a side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuselip_core.errors import FuselipError
from fuselip_core.model.fuselip import Transformer
from fuselip_core.model.packed import pack, pack_equal
from fuselip_core.model.vocabulary import first_end


def build_towers(config: Mapping[str, Any]) -> Any:
    """Towers of open_clip's configuration `config`, `visual` and `text`, with `logit_scale` and `logit_bias`.

    Raises FuselipError for towers that are built of other parts than the published ones.
    """
    import open_clip  # type: ignore[import-untyped]  # here, because it takes seconds that FuseLIP alone can do without

    towers: Any = open_clip.CustomTextCLIP(
        embed_dim=config["embed_dim"],
        vision_cfg=dict(config["vision_cfg"]),
        text_cfg={key: value for key, value in config["text_cfg"].items() if key != "mask_pad"},
        quick_gelu=bool(config.get("quick_gelu", False)),
        init_logit_scale=math.log(10.0),
        init_logit_bias=config.get("init_logit_bias", -10.0),
    )
    visual, text = towers.visual, towers.text
    plain_image = getattr(visual, "pool_type", None) == "tok" and visual.attn_pool is None
    if not plain_image or visual.final_ln_after_pool or text.pool_type != "argmax" or text.cls_emb is not None:
        raise FuselipError(
            "the towers must pool their class token and their end-of-text token, as published; "
            "take other pooling out of vision_cfg and text_cfg"
        )
    for tower in (visual, text):
        tower.transformer = _own_blocks(tower.transformer)
    # The published configuration's own switch; open_clip has it in the tower but not in its configuration.
    text.use_pad_mask = bool(config["text_cfg"].get("mask_pad", False))
    return towers


def image_tower_output(visual: Any, pixels: Tensor) -> Tensor:
    """Normalised pixels (B, 3, S, S) → the image tower's output (B, W), which is its class token's."""
    x = visual._embeds(pixels)
    layout = pack_equal(x.shape[0], x.shape[1], x.device)
    x = visual.transformer(x.flatten(0, 1), layout=layout, read=layout.pooled)
    return _projected(visual.ln_post(x), visual.proj)


def text_tower_output(text: Any, input_ids: Tensor) -> Tensor:
    """Text ids (B, L) int64 with begin, end and padding → the text tower's output (B, W), at the first end-of-text."""
    if not text.use_pad_mask:  # padding is read, so that it can't be left out
        x = text.transformer(text.token_embedding(input_ids) + text.positional_embedding[: input_ids.shape[1]])
        x = x[torch.arange(len(x), device=x.device), first_end(input_ids)]
        return _projected(text.ln_final(x), text.text_projection)
    different, which = torch.unique(input_ids.cpu(), dim=0, return_inverse=True)
    ids, layout, order = pack([different])
    device = text.positional_embedding.device
    ids, layout = ids.to(device), layout.each(lambda tensor: tensor.to(device, non_blocking=True))
    x = text.token_embedding(ids) + F.embedding(layout.positions, text.positional_embedding)
    x = text.transformer(x, layout=layout, read=layout.pooled)
    x = _projected(text.ln_final(x), text.text_projection)
    return F.embedding(order[which].to(device), x)  # not plain indexing, whose gradient adds up in any order


def _projected(x: Tensor, projection: Tensor | nn.Linear | None) -> Tensor:
    if projection is None:
        return x
    projected: Tensor = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    return projected


def _own_blocks(stack: Any) -> Transformer:
    """This project's stack of blocks with the weights, under the same names, and the activation of open_clip's."""
    blocks = list(stack.resblocks)
    width, heads = blocks[0].attn.embed_dim, blocks[0].attn.num_heads
    own = Transformer(width, heads, len(blocks), blocks[0].mlp.c_fc.out_features / width)
    try:
        own.load_state_dict(stack.state_dict(), assign=True)
    except (RuntimeError, AttributeError) as error:
        raise FuselipError(
            "the towers' blocks have other parts than the published ones; take such options out"
        ) from error
    for block, theirs in zip(own.resblocks, blocks, strict=True):
        block.get_submodule("mlp").gelu = theirs.mlp.gelu
    return own
