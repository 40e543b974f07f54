"""Text generation: a prefill, then one compiled decode loop with a fixed-size cache."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from darex_jax.core.errors import DarexError
from darex_jax.models import Model, Params
from darex_jax.models.decoder import Cache, CausalLM, DecoderConfig, empty_cache

Array = jax.Array
Sampling = tuple[Array, Array] | None  # (key, temperature); None is greedy
COLDEST = 1e-30  # temperatures below are greedy: logits divided by them would be infinite


class DecodeState(NamedTuple):
    """The state of a generation.

    Attributes:
      cache: of everything before `token`.
      token: int32 [B], the last generated token, not yet fed to the model.
      given: int32 scalar, number of generated tokens.
      done: bool [B], True where a row has ended; it then generates padding.
    """

    cache: Cache
    token: Array
    given: Array
    done: Array


def generate(
    model: Model,
    params: Params,
    input_ids: ArrayLike,
    attention_mask: ArrayLike,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    key: Array | None = None,
    temperature: float = 0.0,
) -> Array:
    """Continues prompts, greedily or at a temperature.

    Args:
      model, params: a causal language model from `load_model`.
      input_ids, attention_mask: [B, T], prompts padded on the left; every row has a token.
      max_new_tokens: maximum number of generated tokens, at least 1.
      eos_token_id: a row ends at this token, or at the first of several; None never ends early.
      key: typed key, used above temperature 0 only; token i of a row depends on it, i and the row.
      temperature: 0 is greedy decoding (ties give the first token); otherwise the logits are divided by it.
    Returns: int32 [B, max_new_tokens]; after its end a row is filled with the config's pad_token_id, or with
      the end token if there is none.
    Raises: ValueError for a model without a language-model head, or invalid arguments.
    """
    if max_new_tokens < 1:
        raise DarexError(f"max_new_tokens is {max_new_tokens}, expected at least 1.")
    sampling, stops = sampling_of(key, temperature), stop_tokens(eos_token_id)
    state = prefill(
        model,
        params,
        input_ids,
        attention_mask,
        slots=jnp.shape(input_ids)[1] + max_new_tokens,
        stops=stops,
        sampling=sampling,
    )
    first = state.token[:, None]
    if max_new_tokens == 1:
        return first
    pad = padding_token(model, eos_token_id)
    rest, _ = decode(model, params, state, max_new_tokens - 1, stops=stops, pad=pad, sampling=sampling)
    return jnp.concatenate([first, rest], axis=1)


def prefill(
    model: Model,
    params: Params,
    input_ids: ArrayLike,
    attention_mask: ArrayLike,
    *,
    slots: int,
    stops: Array,
    sampling: Sampling = None,
) -> DecodeState:
    """Runs the prompts and chooses the first new token, the state's `token`.

    Args:
      slots: size of the cache: prompt plus new tokens.
      stops: int32 [E], tokens that end a row; may be empty.
    Raises: ValueError if the model cannot generate, or the prompts do not fit in the slots.
    """
    if not (isinstance(model.config, DecoderConfig) and model.config.architectures[0].endswith("CausalLM")):
        raise DarexError(
            f"{model.config.architectures[0]} has no language-model head, so it cannot generate."
        )
    shape = jnp.shape(input_ids)
    if len(shape) != 2 or jnp.shape(attention_mask) != shape or not 0 < shape[1] < slots:
        raise DarexError(
            f"input_ids {shape} and attention_mask {jnp.shape(attention_mask)} must be [batch, prompt], with "
            f"fewer positions than the cache has slots ({slots})."
        )
    return _prefill(
        model, params, jnp.asarray(input_ids), jnp.asarray(attention_mask), slots, stops, sampling
    )


@partial(jax.jit, static_argnums=(0, 4))
def _prefill(
    model: Model,
    params: Params,
    input_ids: Array,
    attention_mask: Array,
    slots: int,
    stops: Array,
    sampling: Sampling,
) -> DecodeState:
    module: CausalLM = model.module(params)
    dtype = params["model"]["embed_tokens"]["weight"].dtype
    assert isinstance(model.config, DecoderConfig)
    rows = input_ids.shape[0]
    cache = empty_cache(model.config, rows, slots, dtype)
    nothing = DecodeState(cache, jnp.zeros(rows, jnp.int32), jnp.int32(0), jnp.zeros(rows, bool))
    return _feed(module, nothing, input_ids, attention_mask != 0, stops, sampling)


@partial(jax.jit, static_argnums=(0, 3), donate_argnums=2)
def decode(
    model: Model,
    params: Params,
    state: DecodeState,
    steps: int,
    *,
    stops: Array,
    pad: ArrayLike,
    sampling: Sampling = None,
) -> tuple[Array, DecodeState]:
    """The next `steps` tokens [B, steps] and the state after them; stops early once every row is done.

    The state is donated: its buffers are reused for the new state.
    """
    module: CausalLM = model.module(params)
    rows = state.token.shape[0]

    def step(carry: tuple[Array, DecodeState, Array]) -> tuple[Array, DecodeState, Array]:
        i, state, out = carry
        done = state.done
        real = jnp.ones((rows, 1), bool)
        state = _feed(module, state, state.token[:, None], real, stops, sampling)
        shown = jnp.where(done, jnp.asarray(pad, jnp.int32), state.token)
        out = jax.lax.dynamic_update_slice_in_dim(out, shown[:, None], i, axis=1)
        return i + 1, state, out

    def unfinished(carry: tuple[Array, DecodeState, Array]) -> Array:
        i, state, _ = carry
        return (i < steps) & ~jnp.all(state.done)

    out = jnp.full((rows, steps), pad, jnp.int32)
    _, state, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, out))
    return out, state


def _feed(
    module: CausalLM, state: DecodeState, tokens: Array, real: Array, stops: Array, sampling: Sampling
) -> DecodeState:
    """Feeds tokens [B, T] and chooses the next one; logits are computed for the last position only."""
    out = module.model(tokens, real, state.cache)
    assert out.cache is not None  # the input had a cache
    logits = module.logits(out.last_hidden_state[:, -1]).astype(jnp.float32)  # B D -> B V
    if sampling is None:
        token = jnp.argmax(logits, axis=-1)
    else:
        key, temperature = sampling
        token = jax.random.categorical(jax.random.fold_in(key, state.given), logits / temperature)
    token = token.astype(jnp.int32)
    done = state.done | jnp.any(token[:, None] == stops[None], axis=1)
    return DecodeState(out.cache, token, state.given + 1, done)


def sampling_of(key: Array | None, temperature: float) -> Sampling:
    """Raises: ValueError for a negative temperature, or one above 0 without a key."""
    if not temperature >= 0.0:
        raise DarexError(f"temperature is {temperature}, expected 0 (greedy) or more.")
    if temperature < COLDEST:
        return None
    if key is None:
        raise DarexError("a temperature above 0 draws tokens: pass key=jax.random.key(seed).")
    return key, jnp.float32(temperature)


def end_tokens(eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """The end tokens as a tuple."""
    if isinstance(eos_token_id, int | np.integer):
        return (int(eos_token_id),)
    return tuple(eos_token_id or ())


def stop_tokens(eos_token_id: int | Sequence[int] | None) -> Array:
    """The end tokens as int32 [E], for `prefill` and `decode`."""
    return jnp.asarray(end_tokens(eos_token_id), jnp.int32)


def padding_token(model: Model, eos_token_id: int | Sequence[int] | None) -> int:
    """The token that fills a row before its start and after its end: a row of the embedding, also where the
    config says -1, as early Llamas do."""
    pad = model.config.pad_token_id
    return pad if pad is not None and pad >= 0 else next(iter(end_tokens(eos_token_id)), 0)
