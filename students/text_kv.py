"""Keys and values of the text, computed once while the text stays the same: exact, for sampling only.

The cross-attention of a Wan block projects the whole caption at every call. The flow head runs N times per outer step
on one and the same caption embedding, so its N - 1 further projections are work for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn


class TextOnceProcessor(WanAttnProcessor):
    """Wan's cross-attention, which keeps the keys and values of the text until it is called with another text tensor.

    Args:
        backend: attention backend of the processor it stands in for.
    """

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        self._attention_backend = backend
        self._text: Tensor | None = None
        self._projected: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As ``WanAttnProcessor``; the text is told apart by identity, so a new tensor is always projected."""
        if (
            encoder_hidden_states is None
            or attention_mask is not None
            or rotary_emb is not None
            or attn.fused_projections
        ):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if self._projected is None or self._text is not encoder_hidden_states:
            key = attn.norm_k(attn.to_k(encoder_hidden_states))
            value = attn.to_v(encoder_hidden_states)
            self._text = encoder_hidden_states
            self._projected = key.unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        out = dispatch_attention_fn(query, *self._projected, backend=self._attention_backend)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query)))


@contextmanager
def text_once(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While open, the cross-attention of these Wan blocks projects each text once; without gradients only.

    Args:
        blocks: Wan blocks; compiled ones, and those with another processor than Wan's own, are left alone.
    """
    crossings: list[Any] = [
        getattr(block, "attn2", None)
        for block in blocks
        if getattr(block, "_compiled_call_impl", None) is None  # a compiled block would compile anew for each text
    ]
    changed = [
        (cross, cross.processor) for cross in crossings if type(getattr(cross, "processor", None)) is WanAttnProcessor
    ]
    for cross, before in changed:
        cross.set_processor(TextOnceProcessor(before._attention_backend))
    try:
        yield
    finally:
        for cross, before in changed:
            cross.set_processor(before)
