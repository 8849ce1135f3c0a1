"""What a weights file does not record: the image transform and the activation it was trained with.

open_clip knows both for its own tags. Weights from a file have those of the tag that the user names, or what all tags
of the architecture agree on; where the tags do not agree, a warning names the choice.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from pc_clip.core.errors import UserError, nearest
from pc_clip.models.clip import open_clip

log = logging.getLogger(__name__)

TRANSFORM = ("mean", "std", "interpolation", "resize_mode")


def config_of(name: str, tag: str | None) -> dict[str, Any]:
    """open_clip's record of a tag; empty for a file or for None."""
    return open_clip.get_pretrained_cfg(name, tag) if tag else {}


def check_activation(name: str, tag: str | None) -> None:
    """Raises UserError where the architecture is built with another activation than the tag was trained with.

    open_clip only warns of it, and the weights then give wrong embeddings.
    """
    quick = bool(config_of(name, tag).get("quick_gelu"))
    if config_of(name, tag) and quick != _is_quick(name):
        other = f"{name}-quickgelu" if quick else name.removesuffix("-quickgelu")
        raise UserError(f"the weights {tag} were trained with {_activation(quick)}; name the architecture {other}")


def transform_of_file(name: str, tag: str | None, source: str) -> dict[str, Any] | None:
    """The image transform of weights of `name` in a file that does not say it: of `tag`, or what its tags agree on.

    None where open_clip has no tags of this architecture, as of local-dir: folders, which have a transform themselves.
    Raises UserError for an unknown tag, and for one of another activation.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag:
        if not config_of(name, tag):
            raise UserError(f"{tag!r} is not a tag of {name}. {nearest(tag, tags)}")
        check_activation(name, tag)
        return _transform(name, tag)
    if not tags:
        return None
    transforms = Counter(repr(_transform(name, each)) for each in tags)
    chosen = transforms.most_common(1)[0][0]
    other = [each for each in tags if repr(_transform(name, each)) != chosen]
    differing = [each for each in tags if bool(config_of(name, each).get("quick_gelu")) != _is_quick(name)]
    if other or differing:
        log.warning(
            "%s does not say how its weights were trained. --model.tag TAG does, where it descends from one", source
        )
    if other:
        log.warning("  image transform: as of most tags of %s, but not of %s", name, ", ".join(other))
    if differing:
        log.warning("  activation: %s, but not for %s", _activation(_is_quick(name)), ", ".join(differing))
    return next(_transform(name, each) for each in tags if each not in other)


def _transform(name: str, tag: str) -> dict[str, Any]:
    known = config_of(name, tag)
    return {key: known[key] for key in TRANSFORM if key in known}


def _is_quick(name: str) -> bool:
    return bool((open_clip.get_model_config(name) or {}).get("quick_gelu"))


def _activation(quick: bool) -> str:
    return "QuickGELU" if quick else "GELU"
