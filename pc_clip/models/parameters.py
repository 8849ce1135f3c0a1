"""Trainable parameters: the values of `model.train` and the weights they select."""

from __future__ import annotations

from torch import nn

from pc_clip.core.errors import UserError, check_choice

TRAINABLE = ("text_blocks", "text", "all_text_but_embeddings", "both", "attention", "text_attention")

# Where queries, keys and values are made: parameters, and linear layers of towers that do it by a layer.
_PACKED = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "q_bias", "v_bias")
_LAYERS = ("qkv", "q", "k", "v", "kv", "query", "key", "value", "Wqkv", "in_proj")
_LAYERS += ("q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin")


def image_tower_learns(which: str) -> bool:
    """Whether a run with this `model.train` changes the image tower, so that its embeddings cannot be kept."""
    check_choice("model.train", which, TRAINABLE)
    return which in ("both", "attention")


def parameters_of(model: nn.Module, which: str, name: str) -> dict[str, nn.Parameter]:
    """The parameters that `model.train` names, by name in the model's state dict.

    text_blocks: the text transformer's blocks alone, as PC-CLIP's code does (85.1 of 123.7 million in ViT-L-14).
    text: the whole text tower. all_text_but_embeddings: the same without token and position embeddings. both: every
    parameter, the logit scale included. attention: what makes queries, keys and values in both towers, weights and
    biases (as A-CLIP). text_attention: the same in the text tower alone.
    name: of the model, for messages. Raises UserError for an unknown `which`, and a tower that has nothing of the kind.
    """
    check_choice("model.train", which, TRAINABLE)
    parameters = dict(model.named_parameters())
    if which == "both":
        return parameters
    if which == "attention":
        image = {n: p for n, p in parameters.items() if n.startswith("visual.")}
        kept = _attention(image, name, "image", "text_attention or both") | _attention(_text(parameters), name, "text")
        return {n: p for n, p in parameters.items() if n in kept}  # in the model's order
    text = _text(parameters)
    if which == "text":
        return text
    if which == "text_attention":
        return _attention(text, name, "text")
    if which == "all_text_but_embeddings":
        return {n: p for n, p in text.items() if "embedding" not in n}
    blocks = {n: p for n, p in text.items() if "transformer.resblocks." in n or "transformer.encoder.layer." in n}
    if not blocks:
        raise UserError(f"the text tower of {name} has no blocks that are known here; use --model.train text")
    return blocks


def _text(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {n: p for n, p in parameters.items() if not n.startswith(("visual.", "logit_"))}


def _attention(tower: dict[str, nn.Parameter], name: str, which: str, instead: str = "text") -> dict[str, nn.Parameter]:
    attention = {n: p for n, p in tower.items() if _makes_queries(n.split("."))}
    if not attention:
        raise UserError(f"the {which} tower of {name} has no attention that is known here; use --model.train {instead}")
    return attention


def _makes_queries(path: list[str]) -> bool:
    return path[-1] in _PACKED or (len(path) > 1 and path[-2] in _LAYERS and path[-1] in ("weight", "bias"))
