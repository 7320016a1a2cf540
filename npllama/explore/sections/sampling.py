"""11: sampling."""

import base64
import json
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from npllama.explore.choice import Stage
from npllama.explore.figures.sampling import cumulative_choice, sampling_stages
from npllama.explore.labels import count, piece_label
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, Table, piece, say, shape
from npllama.explore.svg import Figure
from npllama.ops import Ops

BARS = 10
_OTHERS = "…"
_NAMES = {
    "softmax": "softmax",
    "penalize_repetition": "repetition penalty",
    "divide_by_temperature": "temperature",
    "keep_top_k": "top-k",
    "keep_top_p": "top-p",
    "keep_min_p": "min-p",
}


def section(run: Record) -> Section:
    v = run.config.vocab_size
    return Section(
        slug="sampling",
        title="Sampling: from probabilities to one token",
        idea=_idea(run),
        equations=(
            r"p_i = \frac{e^{z_i / \tau}}{\sum_j e^{z_j / \tau}}, \qquad"
            r" \tau \to 0: \text{ the largest logit}",
            r"\text{token} = \min \left\{\, i : \sum_{j \le i} p_j > u \,\right\}, \qquad"
            r" u \sim \text{Uniform}[0, 1)",
        ),
        functions=_functions(run),
        shapes=(
            shape("logits z", "1, V", 1, v),
            *(() if run.choice.uniform is None else (shape("uniform u", "1", 1),)),
            shape("token", "1", 1),
        ),
        parts=_parts(run),
        see=_see(run),
    )


def _idea(run: Record) -> tuple[Markup, ...]:
    idea = [
        say(
            "The head gives every piece a logit. A text of the likeliest pieces alone is dull and "
            "repeats itself. A text that is drawn from the whole softmax sometimes contains "
            "nonsense, because the many unlikely pieces together have some probability. "
            "Temperature and filters are a compromise."
        ),
        say(
            "<strong>Temperature</strong> τ divides the logits <var>z</var>: below 1 it sharpens "
            "the distribution, above 1 it flattens it, and 0 takes the likeliest piece. The "
            "filters then remove the unlikely tail. <strong>Top-k</strong> keeps the <var>k</var> "
            "likeliest pieces. <strong>Top-p</strong> keeps the fewest pieces that together exceed "
            "a given probability: few where the model is sure, many where it is not. "
            "<strong>Min-p</strong> keeps the pieces that are at least a given factor times as "
            "likely as the likeliest. One uniform random number <var>u</var> then chooses among "
            "the remaining pieces."
        ),
    ]
    if _has_penalty(run):
        idea.append(
            say(
                "This run also has a <strong>repetition penalty</strong> of {penalty:g}. Before "
                "the temperature, the logit of each token that the text already contains is "
                "divided by it, or multiplied by it if the logit is not positive.",
                penalty=run.sampling.repetition_penalty,
            )
        )
    return tuple(idea)


def _has_penalty(run: Record) -> bool:
    return run.sampling.repetition_penalty != 1


def _functions(run: Record) -> tuple[Function, ...]:
    penalty = Function(
        Ops.penalize_repetition, ("test_repetition_penalty_moves_seen_tokens_alone",)
    )
    return (
        Function(
            Ops.sample,
            ("test_sample_is_the_first_token_whose_cumulative_probability_exceeds_the_uniform",),
        ),
        *((penalty,) if _has_penalty(run) else ()),
        Function(
            Ops.divide_by_temperature,
            ("test_tokens_are_sampled_as_often_as_they_are_probable",),
        ),
        Function(Ops.keep_top_k, ("test_top_k_keeps_the_k_largest",)),
        Function(Ops.keep_top_p, ("test_top_p_keeps_the_fewest_that_exceed_p",)),
        Function(Ops.keep_min_p, ("test_min_p_keeps_what_is_p_times_as_likely_as_the_likeliest",)),
    )


def _parts(run: Record) -> tuple[Picture | Table, ...]:
    choice = run.choice
    likeliest = np.argsort(-choice.stages[0].probability, kind="stable")[:BARS]
    if choice.id not in likeliest:
        likeliest = np.append(likeliest[:-1], choice.id)
    labels = [run.piece(id_) for id_ in likeliest]
    place = int(np.flatnonzero(likeliest == choice.id)[0])

    def bars(stages: Sequence[Stage], uniform: float | None) -> Figure:
        shown = [(named(stage), stage.probability[likeliest]) for stage in stages]
        return sampling_stages(labels, shown, uniform, place)

    pictures = [
        Picture(
            bars(choice.stages, choice.uniform),
            say(
                "The likeliest tokens after each step of this run, in the order of the steps. ▶ "
                "marks the chosen token. The slider shows the softmax at another temperature, "
                "without filters."
            ),
            _slider(run, likeliest, labels),
        )
    ]
    if choice.alone:
        pictures.append(
            Picture(
                bars(choice.alone, None),
                say("The filters that this run does not use, each alone {where}.", where=_at(run)),
            )
        )
    return (*pictures, *_drawn(run), _table(run))


def _at(run: Record) -> str:
    greedy = run.sampling.temperature == 0
    return "on the probabilities before the choice" if greedy else "after the temperature"


def _slider(run: Record, shown: np.ndarray, labels: list[str]) -> Markup:
    """A control with which the page's script shows the softmax at any temperature.

    Its logits are int16: differences from the largest logit, in steps of 1/512.
    """
    x = run.choice.logits
    below = np.maximum(np.nan_to_num((x - x.max()) * 512, neginf=-32768.0), -32768)
    return say(
        '<div class="control" hidden data-logits="{logits}" data-shown="{shown}" '
        'data-labels="{labels}" data-chosen="{chosen}"><label for="temperature">Try another '
        'temperature</label><input id="temperature" type="range" min="0.05" max="2" step="0.05" '
        'value="{value:.2f}"><output for="temperature"></output><div class="bars"></div></div>',
        logits=base64.b64encode(below.round().astype("<i2").tobytes()).decode("ascii"),
        shown=json.dumps(shown.tolist()),
        labels=json.dumps([piece_label(label) for label in labels], ensure_ascii=False),
        chosen=int(np.flatnonzero(shown == run.choice.id)[0]),
        value=min(max(run.sampling.temperature or 1.0, 0.05), 2.0),
    )


def named(stage: Stage) -> str:
    """A stage with its setting: "top-p 0.9"."""
    name = _NAMES.get(stage.method, stage.method)
    return name if stage.value is None else f"{name} {stage.value:g}"


def _drawn(run: Record) -> tuple[Picture, ...]:
    """The uniform among the remaining tokens, in the order of their ids, as in `Ops.sample`."""
    choice = run.choice
    if choice.uniform is None:
        return ()
    labels, shares, place = intervals(run)
    return (
        Picture(
            cumulative_choice(labels, shares, choice.uniform, place),
            say(
                "The probabilities of the remaining tokens, end to end from 0 to 1 in the order of "
                "their ids{others}. The uniform lies in the interval of the chosen token.",
                others=f"; {_OTHERS} stands for several unlikely ones" if _OTHERS in labels else "",
            ),
        ),
    )


def intervals(run: Record) -> tuple[list[str], np.ndarray, int]:
    """Labels and probabilities of the remaining tokens in the order of their ids, and the index of
    the chosen one. Neighbours that are neither likely nor chosen are joined."""
    choice = run.choice
    last = choice.stages[-1].probability.astype("float64")
    kept = np.flatnonzero(last > 0)
    named_ids = {*kept[np.argsort(-last[kept], kind="stable")[:BARS]].tolist(), choice.id}
    labels: list[str] = []
    shares: list[float] = []
    place = 0
    for id_ in kept.tolist():
        if id_ not in named_ids and labels and labels[-1] == _OTHERS:
            shares[-1] += last[id_]
            continue
        place = len(labels) if id_ == choice.id else place
        labels.append(run.piece(id_) if id_ in named_ids else _OTHERS)
        shares.append(last[id_])
    return labels, np.array(shares) / sum(shares), place


def _table(run: Record) -> Table:
    choice = run.choice
    rows = []
    for stage in (*choice.stages, *choice.alone):
        used = "this run" if stage in choice.stages else "not used here"
        top = int(stage.probability.argmax())
        rows.append(
            (
                named(stage),
                used,
                f"{stage.n_kept:,}",
                f"{run.piece(top)} {stage.probability[top]:.1%}",
                f"{stage.probability[choice.id]:.1%}",
            )
        )
    return Table(
        ("step", "", "tokens left", "likeliest", "the chosen token"),
        tuple(rows),
        say(
            "The steps of this run, and the filters that it does not use, each alone {where}.",
            where=_at(run),
        ),
    )


def _see(run: Record) -> tuple[Markup, ...]:
    return (_where(run), *_how(run))


def _where(run: Record) -> Markup:
    choice = run.choice
    if choice.step == 0:
        return say("This is the choice of the first token after the prompt.")
    return say(
        "This is new token {number} of {all}, after {text}. Its distribution had the largest "
        "entropy of all new tokens: the model was least certain there.",
        number=choice.step + 1,
        all=len(run.new_ids),
        text=Markup(" ").join(piece(run.piece(id_)) for id_ in choice.before[-4:]),
    )


def _how(run: Record) -> tuple[Markup, ...]:
    choice = run.choice
    chosen = piece(run.piece(choice.id))
    first, last = choice.stages[0], choice.stages[-1]
    if choice.uniform is None:
        return (
            say(
                "The temperature is 0, so the likeliest token {chosen} is taken. No random number "
                "is drawn, and the seed has no effect.",
                chosen=chosen,
            ),
        )
    return (
        say(
            "The uniform of seed {seed} and new token {number} is {u:.4f}. It chose {chosen}, "
            "which has the probability {p:.1%} after all steps and had {before:.1%} at first.",
            seed=run.seed,
            number=choice.step + 1,
            u=int(choice.uniform * 1e4) / 1e4,  # rounded down, so it stays below a bound
            chosen=chosen,
            p=float(last.probability[choice.id]),
            before=float(first.probability[choice.id]),
        ),
        say(
            "{kept} of {all} remained. The random number depends only on the seed and on the "
            "number of the token, so the same seed gives the same text.",
            kept=count(last.n_kept, "token"),
            all=f"{first.n_kept:,}",
        ),
    )
