"""11: sampling."""

import base64
import json

import numpy as np
from markupsafe import Markup

from npllama.explore.choice import Stage
from npllama.explore.figures.sampling import cumulative_choice, sampling_stages
from npllama.explore.labels import piece_label
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, Table, count, piece, say, shape
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
    choice, v = run.choice, run.config.vocab_size
    likeliest = np.argsort(-choice.stages[0].probability, kind="stable")[:BARS]
    if choice.id not in likeliest:
        likeliest = np.append(likeliest[:-1], choice.id)
    labels = [run.piece(id_) for id_ in likeliest]
    place = int(np.flatnonzero(likeliest == choice.id)[0])
    return Section(
        slug="sampling",
        title="Sampling: from probabilities to one token",
        idea=(
            say(
                "The head gives every piece a logit. Always taking the likeliest piece makes dull "
                "texts that repeat themselves; drawing from the whole softmax now and then draws "
                "nonsense, since the many unlikely pieces have some probability together. "
                "Sampling lies between."
            ),
            say(
                "<strong>Temperature</strong> divides the logits: below 1 it sharpens, above 1 it "
                "flattens. The filters then drop the unlikely tail. <strong>Top-k</strong> keeps "
                "the <var>k</var> likeliest; <strong>top-p</strong> keeps the fewest that reach a "
                "probability of <var>p</var> together, few where the model is sure and many where "
                "it is not; <strong>min-p</strong> keeps what is at least <var>p</var> times as "
                "likely as the likeliest. One uniform random number then chooses among the rest."
            ),
        ),
        equations=(
            r"p_i = \frac{e^{x_i / \tau}}{\sum_j e^{x_j / \tau}}",
            r"\text{token} = \min \left\{\, i : \sum_{j \le i} p_j > u \,\right\}, \qquad"
            r" u \sim \text{Uniform}[0, 1)",
        ),
        functions=(
            Function(
                Ops.sample,
                (
                    "test_sample_is_the_first_token_whose_cumulative_probability_exceeds_the_"
                    "uniform",
                ),
            ),
            Function(
                Ops.divide_by_temperature,
                ("test_tokens_are_sampled_as_often_as_they_are_probable",),
            ),
            Function(Ops.keep_top_k, ("test_top_k_keeps_the_k_largest",)),
            Function(Ops.keep_top_p, ("test_top_p_keeps_the_fewest_that_exceed_p",)),
            Function(
                Ops.keep_min_p, ("test_min_p_keeps_what_is_p_times_as_likely_as_the_likeliest",)
            ),
        ),
        shapes=(
            shape("logits", "B, V", 1, v),
            shape("uniform", "B", 1),
            shape("token", "B", 1),
        ),
        parts=(
            Picture(
                sampling_stages(
                    labels,
                    [(named(stage), stage.probability[likeliest]) for stage in choice.stages],
                    choice.uniform,
                    place,
                ),
                say(
                    "The likeliest tokens and the chosen one after each step of this run; the "
                    "steps are applied from left to right."
                ),
                _slider(run, likeliest, labels),
            ),
            *_drawn(run),
            _table(run),
        ),
        see=_see(run),
    )


def _slider(run: Record, shown: np.ndarray, labels: list[str]) -> Markup:
    """A control with which the page's script shows the softmax at any temperature.

    It carries the logits as int16: below the largest, in steps of 1/128.
    """
    x = run.choice.logits
    below = np.maximum(np.nan_to_num((x - x.max()) * 128, neginf=-32768.0), -32768)
    return say(
        '<div class="control" hidden data-logits="{logits}" data-shown="{shown}" '
        'data-labels="{labels}" data-chosen="{chosen}"><label for="temperature">Try another '
        'temperature</label><input id="temperature" type="range" min="0.05" max="2" step="0.05" '
        'value="{value:.2f}"><output for="temperature"></output><div class="bars"></div></div>',
        logits=base64.b64encode(below.round().astype("<i2").tobytes()).decode("ascii"),
        shown=json.dumps(shown.tolist()),
        labels=json.dumps([piece_label(label) for label in labels], ensure_ascii=False),
        chosen=int(np.flatnonzero(shown == run.choice.id)[0]),
        value=min(max(run.sampling.temperature, 0.05), 2.0),
    )


def named(stage: Stage) -> str:
    """A stage with its setting: "top-p 0.9"."""
    name = _NAMES.get(stage.method, stage.method)
    return name if stage.value is None else f"{name} {stage.value:g}"


def _drawn(run: Record) -> tuple[Picture, ...]:
    """The uniform among the tokens that are left, in the order of their ids, as `sample` adds."""
    choice = run.choice
    if choice.uniform is None:
        return ()
    labels, shares, place = intervals(run)
    return (
        Picture(
            cumulative_choice(labels, shares, choice.uniform, place),
            say(
                "The tokens that are left lie end to end from 0 to 1, in the order of their ids"
                "{others}. The uniform falls into the chosen one.",
                others=f"; {_OTHERS} are unlikely ones together" if _OTHERS in labels else "",
            ),
        ),
    )


def intervals(run: Record) -> tuple[list[str], np.ndarray, int]:
    """Labels and probabilities of the tokens that are left, in the order of their ids, and the
    place of the chosen one. All but the likeliest and the chosen one are joined to neighbours."""
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
            "Each step of this run, and what each filter that it does not use would leave, alone, "
            "after the temperature."
        ),
    )


def _see(run: Record) -> tuple:
    choice = run.choice
    chosen = piece(run.piece(choice.id))
    first, last = choice.stages[0], choice.stages[-1]
    if choice.uniform is None:
        how = say(
            "The temperature is 0, so no random number is drawn: the likeliest token, {chosen}, "
            "is taken.",
            chosen=chosen,
        )
    else:
        how = say(
            "The uniform of seed {seed} is {u:.4f}, and it chose {chosen}, which has {p:.1%} "
            "after all steps and had {before:.1%} at first.",
            seed=run.seed,
            u=int(choice.uniform * 1e4) / 1e4,  # rounded down, as it stays below a bound
            chosen=chosen,
            p=float(last.probability[choice.id]),
            before=float(first.probability[choice.id]),
        )
    where = (
        say("This is the first token after the prompt.")
        if choice.step == 0
        else say(
            "This is new token {step} of {all}, after {text}, where the model was least certain "
            "of all.",
            step=choice.step + 1,
            all=len(run.new_ids),
            text=Markup(" ").join(piece(run.piece(id_)) for id_ in choice.before[-4:]),
        )
    )
    return (
        where,
        how,
        say(
            "{kept} of {all} could still be chosen at the end. The random number is a function "
            "of the seed and of the token's number alone, so the same seed gives the same text.",
            kept=count(last.n_kept, "token"),
            all=f"{first.n_kept:,}",
        ),
    )
