"""What a decode step reads and writes on the device, besides the cache."""

from dataclasses import dataclass

from npllama.backend import Array


@dataclass
class StepState:
    """The device arrays of the rows that are decoded together; a step updates them in place.

    Attributes:
        tokens: (B,) int64, each row's last token: what the next step feeds, and then replaces.
        uniforms: (n_steps, B) float64, the random numbers of all steps; None where the likeliest
            token is taken.
        step: (1,) int64, which of the uniforms are next.
        seen: (B, V) bool, the tokens of each row so far; None where no penalty needs them.
    """

    tokens: Array
    uniforms: Array | None
    step: Array
    seen: Array | None

    def next_uniform(self) -> Array | None:
        """(B,) numbers for the tokens that are chosen now."""
        if self.uniforms is None:
            return None
        uniform = self.uniforms[self.step][0]  # (n_steps, B), (1,) -> (1, B) -> (B,)
        self.step += 1
        return uniform

    def of_rows(self, index: Array) -> "StepState":
        """The state of some of the rows, `index` (B',) on the device, in arrays of its own."""
        return StepState(
            tokens=self.tokens[index],
            uniforms=None if self.uniforms is None else self.uniforms[:, index],
            step=self.step,
            seen=None if self.seen is None else self.seen[index],
        )
