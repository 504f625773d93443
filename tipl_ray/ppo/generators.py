"""Random generators as words that can be kept, and what is drawn for actions."""

import numpy as np

WORDS = 6
"""Of a generator's state."""


def generator_state(generator: np.random.Generator) -> np.ndarray:
    """A PCG64 generator's whole state as (6,) uint64."""
    state = generator.bit_generator.state
    word = 2**64
    inner, increment = state["state"]["state"], state["state"]["inc"]
    words = [inner // word, inner % word, increment // word, increment % word, state["has_uint32"], state["uinteger"]]
    return np.array(words, dtype=np.uint64)


def restored_generator(words: np.ndarray) -> np.random.Generator:
    """The generator whose state `generator_state` wrote down."""
    high, low, increment_high, increment_low, has_uint32, uinteger = (int(item) for item in words)
    bits = np.random.PCG64()
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": high * 2**64 + low, "inc": increment_high * 2**64 + increment_low},
        "has_uint32": has_uint32,
        "uinteger": uinteger,
    }
    return np.random.Generator(bits)


def action_noise(generator: np.random.Generator, size: tuple[int, ...], discrete: bool) -> np.ndarray:
    """What an actor adds to its means, or to its logits, to sample an action; float32 of this size.

    It is normal or, for discrete actions, Gumbel's: the largest sum of logit and noise is a sample of their softmax.
    """
    if discrete:
        return generator.gumbel(size=size).astype(np.float32)
    return generator.standard_normal(size, dtype=np.float32)
