"""Checks of the prompts and the image size that users request from a latent pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from atdiff.core.errors import UserError
from atdiff.pipelines.families import family_of

__all__ = ["check_prompts", "check_size"]


def check_prompts(source: str, pipeline: Any, prompts: Sequence[str]) -> None:  # noqa: ANN401  (of diffusers)
    """Raise a UserError if a class-conditional pipeline gets prompts other than its class numbers."""
    if not family_of(pipeline).labelled:
        return
    known = pipeline.transformer.config.num_embeds_ada_norm
    for prompt in prompts:
        if not (prompt.isascii() and prompt.isdigit() and int(prompt) < known):
            raise UserError(
                f"{source} is class-conditional, so the prompt {prompt!r} must be a class number from 0 to "
                f"{known - 1}; or give --class-label."
            )


def check_size(source: str, pipeline: Any, size: tuple[int, int]) -> None:  # noqa: ANN401
    """Raise a UserError unless a pipeline can generate images of ``size``.

    Args:
        source: the pipeline, as the user named it.
        pipeline: a diffusers pipeline.
        size: height and width.
    """
    family, (height, width) = family_of(pipeline), size
    asked = f"size {width}x{height} (width x height)"
    if not family.call_options(size):
        raise UserError(f"{source} is a {type(pipeline).__name__}, which generates one size only; leave out the size.")
    step, most = family.size_step(pipeline), family.largest_side(pipeline)
    if min(size) < step or any(side % step for side in size):
        nearest = "x".join(str(max(1, round(side / step)) * step) for side in (width, height))
        raise UserError(f"{asked} does not fit {source}: expected multiples of {step} pixels, such as {nearest}.")
    if most is not None and max(size) > most:
        raise UserError(
            f"{asked} does not fit {source}, whose network has positions up to {most} pixels a side; use a smaller "
            "size."
        )
