"""What was found, in words: for the terminal, the summary and the paper.

In come results; out come sentences, the same words whichever way it fell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lab.machine.options import PROGRAM
from lab.measure import people, statistics
from lab.measure.attributes import Association
from lab.measure.comparison import Comparison, SeveralSeeds
from lab.measure.corruptions import BENCHMARK_SIZE, PUBLISHED_ACCURACY
from lab.measure.failures import Dossier, SureMistakes, Transition, TransitionCounts
from lab.measure.models import Network
from lab.measure.planning import MOST_SEEDS, Planning, SeedCount
from lab.measure.statistics import Difference, Interval, Verdict
from lab.measure.stress import Outcome
from lab.measure.suspects import LabelSuspects, Rejected
from lab.report.measurements import Change, beyond_chance, changes_from_first
from lab.report.results import Results


def say_verdicts(results: Results) -> list[str]:
    """The verdict on each network but the first."""
    verdicts = []
    for comparison in results.comparisons:
        verdicts.append(say_verdict(comparison, results.classes, results.setup.rules))
    return verdicts


def say_conclusion(results: Results) -> str:
    """The verdicts in a sentence each, networks of the same verdict in one."""
    alike: dict[str, list[Comparison]] = {}
    for comparison in results.comparisons:
        state = state_of(
            comparison.overall.difference, comparison.first, results.setup.rules.margin
        )
        alike.setdefault(state, []).append(comparison)
    said = []
    for state, comparisons in alike.items():
        names = []
        numbers = []
        for comparison in comparisons:
            names.append(f"{comparison.network.title} CNN")
            numbers.append(in_points(comparison.overall.difference.interval))
        whose = as_trained_here(len(results.setup.seeds))
        are = "is" if len(names) == 1 else "are"
        said.append(f"{join_with_and(names)}{whose} {are} {state} ({'; '.join(numbers)}).")
    return " ".join(said)


def say_retest(results: Results) -> str:
    """The verdicts on a second test set; "" without one."""
    retest = results.retest
    if retest is None:
        return ""
    said = []
    for comparison in results.comparisons:
        group = retest.compared[comparison.network.key]
        verdict = name_verdict(
            group.difference,
            comparison.network,
            comparison.first,
            results.setup.rules.margin,
            len(group.by_seed),
        )
        numbers = f"{in_points(group.difference.interval)}, {say_p(group.difference.p_holm)}"
        said.append(f"{verdict} ({numbers}).")
    return (
        f"On {retest.images:,} new images of the same kind, to which nothing was ever tuned: "
        f"{' '.join(said)}"
    )


def in_points(interval: Interval) -> str:
    """A difference with its interval, as in "+0.15 points, -0.31 to +0.60"."""
    return f"{interval.value:+.2f} points, {bounds(interval)}"


def bounds(interval: Interval, style: str = "+.2f") -> str:
    """From where to where it goes: "-0.31 to +0.60"."""
    return f"{format(interval.low, style)} to {format(interval.high, style)}"


def ask(compared: Sequence[Network]) -> str:
    """The beginning of a title, of which the networks that are compared are the subject.

    "Does … Help", "Do … and … Help".
    """
    subjects = [network.subject or f"the {network.title} CNN" for network in compared]
    verb = "Does" if len(subjects) == 1 else "Do"
    return f"{verb} {join_with_and(subjects)} Help"


def say_looks(results: Results) -> str:
    """That this is not the first look, and what that costs; "" where it is."""
    seeds = tuple(results.setup.seeds)
    places = [k for k, look in enumerate(results.looks) if look.seeds == seeds]
    if not places or places[0] == 0:
        return ""
    before = [f"{len(look.seeds)}" for look in results.looks[: places[0]]]
    return (
        f"This is look {places[0] + 1} at these networks, after one at {join_with_and(before)} "
        f"seeds. Looking until something is decided finds what is not there, so that this one's "
        f"tests have a level of {results.setup.rules.level:.2g} each. The number of seeds had "
        "better be fixed beforehand."
    )


def number_of(count: int, thing: str) -> str:
    """As in "1 epoch" and "15 epochs"."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def join_with_and(words: Sequence[str]) -> str:
    """As in a sentence: "a", "a and b", "a, b and c"."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def classes_with(verdict: Verdict, comparison: Comparison, classes: Sequence[str]) -> str:
    """The classes of a verdict in words, "none" where there are none."""
    names = []
    for name, group in zip(classes, comparison.by_class, strict=True):
        if group.difference.verdict is verdict:
            names.append(name)
    return ", ".join(names) or "none"


def say_verdict(comparison: Comparison, classes: Sequence[str], rules: statistics.Settings) -> str:
    """The comparison in words, the same words whichever way it fell."""
    overall = comparison.overall
    difference = overall.difference
    interval = difference.interval
    seeds = len(overall.by_seed)
    test = "McNemar's exact test, margin and interval by Tango's score test"
    if overall.over_seeds is not None:
        test = f"paired t test over {seeds} seeds, on these images"
    numbers = (
        f"{interval.value:+.2f} percentage points, {100 * (1 - rules.level):g} % interval "
        f"{bounds(interval)} ({test}, {say_p(difference.p_holm)}; "
        f"against the margin {say_p(difference.margin_p_holm)}{say_correction(difference)}). The "
        f"smallest margin within which they are shown to be equivalent is "
        f"{difference.smallest_margin:.2f} points"
    )
    if overall.over_seeds is None:
        caution = "One seed can't speak for the architecture."
    else:
        caution = say_seeds(overall.over_seeds, seeds, rules)
    better = classes_with(Verdict.BETTER, comparison, classes)
    worse = classes_with(Verdict.WORSE, comparison, classes)
    equivalent = classes_with(Verdict.EQUIVALENT, comparison, classes)
    verdict = name_verdict(difference, comparison.network, comparison.first, rules.margin, seeds)
    return (
        f"{verdict}: {numbers}. {caution} By class, Holm-corrected: better on {better}; "
        f"worse on {worse}; equivalent on {equivalent}."
    )


def say_correction(difference: Difference) -> str:
    """That p is corrected over the networks, where there are several to correct it over."""
    return ", Holm-corrected over the networks" if difference.p_holm != difference.p else ""


def name_verdict(
    difference: Difference, network: Network, first: Network, margin: float, seeds: int
) -> str:
    """The verdict as a clause; with one seed it is on two trained networks alone."""
    whose = as_trained_here(seeds)
    return f"{network.title} CNN{whose} is {state_of(difference, first, margin)}"


def as_trained_here(seeds: int) -> str:
    """What is said of a network with one seed, which can't speak for the architecture; else ""."""
    return " as trained here" if seeds == 1 else ""


def state_of(difference: Difference, first: Network, margin: float) -> str:
    """What a network "is", held against the first."""
    other = f"{first.title} CNN"
    if difference.verdict is Verdict.UNDECIDED and margin == 0:
        return f"undecided against {other}: no difference is shown"
    if difference.verdict is Verdict.UNDECIDED:
        return (
            f"undecided against {other}: neither a difference is shown nor that there is none of "
            f"{margin:g} points"
        )
    if difference.verdict is Verdict.EQUIVALENT:
        return f"equivalent to {other} within {margin:g} points"
    less = f", by less than the margin of {margin:g} points" if difference.is_within_margin else ""
    return f"{difference.verdict} than {other}{less}"


def say_seeds(found: SeveralSeeds, seeds: int, rules: statistics.Settings) -> str:
    """What several seeds tell beside the verdict."""
    both = found.interval_over_seeds_and_images
    quality = found.spread.of_quality
    limits = join_with_and([f"{posterior.bound:g}" for posterior in found.posteriors])
    likely = join_with_and([f"{posterior.probability:.3g}" for posterior in found.posteriors])
    sentences = [
        f"For other images as well as other seeds the interval is {both.low:+.2f} to "
        f"{both.high:+.2f}.",
        f"The effect is {found.effect_size:+.2f} standard deviations from seed to seed; quality "
        f"alone varies by one of {quality.value:.2f} points ({quality.low:.2f} to "
        f"{quality.high:.2f}).",
        say_planning(found.planning, seeds, rules),
    ]
    if rules.margin > 0:
        sentences.insert(
            1,
            f"The true difference is smaller than {limits} points, to either side, with a "
            f"probability of {likely}, by a Bayesian t test with a flat prior.",
        )
    return " ".join(sentences)


def say_planning(planning: Planning, seeds: int, rules: statistics.Settings) -> str:
    """What so many seeds can show, in words."""
    sentence = (
        f"{seeds} seeds detect a difference of {planning.detectable_difference:.2f} points "
        f"{100 * rules.power:g} % of the time, and would as often show that networks without "
        f"one are equivalent within {planning.provable_margin:.2f}."
    )
    if planning.deciding is None:
        return sentence
    return (
        f"{sentence} {say_count(planning.deciding)} would do both for {rules.margin:g} points, as "
        "far as these seeds tell their spread."
    )


def say_count(count: SeedCount) -> str:
    """How many seeds would decide, with its range."""
    more = f"more than {MOST_SEEDS:,}"
    likeliest = more if count.seeds is None else f"{count.seeds}"
    fewest = more if count.fewest is None else f"{count.fewest}"
    most = more if count.most is None else f"{count.most}"
    if fewest == most:
        return f"{likeliest[0].upper()}{likeliest[1:]} seeds"
    return f"{likeliest[0].upper()}{likeliest[1:]} seeds ({fewest} to {most})"


def count_style(seeds: int) -> str:
    """How counts are printed: of several seeds they are means, to a tenth."""
    return ",.0f" if seeds == 1 else ",.1f"


def say_transitions(counts: TransitionCounts) -> str:
    """What one network makes of the other's mistakes."""
    same_class = counts.counts[Transition.SAME_CLASS]
    stay = same_class + counts.counts[Transition.OTHER_CLASS]
    corrected = counts.counts[Transition.CORRECTED]
    broken = counts.counts[Transition.BROKEN]
    seeds = len(stay)

    def mean(by_seed: np.ndarray) -> str:
        return format(by_seed.mean(), count_style(seeds))

    over_seeds = "" if seeds == 1 else f" (means over {seeds} seeds)"
    return (
        f"Of {counts.first.title}'s {mean(stay + corrected)} mistakes, {counts.network.title} "
        f"corrects {mean(corrected)} and makes {mean(broken)} new ones; "
        f"{mean(stay)} stay, {mean(same_class)} of them with the same class{over_seeds}."
    )


def say_sureness(mistakes: Sequence[SureMistakes], level: float) -> list[str]:
    """Where the temperature takes away what made one network's mistakes surer than another's.

    One that is less sure of everything makes fewer of high confidence without knowing more:
    dividing the logits by the temperature takes that away. Said once a network, of its largest
    change, where the change as trained, and what is taken of it, are both beyond chance.
    """
    first, *others = mistakes
    style = count_style(len(first.as_trained))
    sentences = []
    for other in others:
        changes = other.as_trained.mean(0) - first.as_trained.mean(0)
        for k in np.argsort(-np.abs(changes), kind="stable").tolist():
            if max(other.p_as_trained[k], other.p_of_scaling[k]) >= level:
                continue
            fewer = changes[k] < 0
            as_trained = [format(one.as_trained[:, k].mean(), style) for one in (other, first)]
            scaled = [format(one.scaled[:, k].mean(), style) for one in (other, first)]
            sentences.append(
                f"At {other.levels[k]:g} % confidence {other.network.title} makes "
                f"{'fewer' if fewer else 'more'} mistakes than {first.network.title} as trained "
                f"({' and '.join(as_trained)}, {say_p(other.p_as_trained[k])}); scaling the "
                f"temperature changes that (to {' and '.join(scaled)}; "
                f"{say_p(other.p_of_scaling[k])} of no such change, {say_p(other.p_scaled[k])} of "
                "no difference afterwards)."
            )
            break
    return sentences


def say_common(common: Sequence[Sequence[Association]]) -> str:
    """What the mistakes of all networks go with."""
    if not common:
        return "None of the attributes measured goes with the mistakes of all networks."
    parts = []
    for group in common:
        direction = "more" if group[0].correlation.value > 0 else "less"
        correlations = []
        for one in group:
            r = one.correlation
            interval = f"{r.value:+.2f}, {r.low:+.2f} to {r.high:+.2f}"
            correlations.append(f"{interval}, {one.network.title}")
        parts.append(f"{direction} {group[0].attribute} ({'; '.join(correlations)})")
    return (
        "Mistakes of all networks go with " + ", ".join(parts) + " (rank correlations, Holm-"
        "corrected)."
    )


def say_suspects(
    labels: LabelSuspects, comparisons: Sequence[Comparison], images: int, margin: float
) -> str:
    """On how many images all networks agree against the label, and what people say of those."""
    count = len(labels.suspects)
    if count == 0:
        sentence = f"On none of {images:,} test images do all networks agree against the label."
    else:
        are = "images are" if count > 1 else "image is"
        sentence = (
            f"On {count:,} of {images:,} test images all networks agree with confidence against "
            f"the label: such {are} hard or mislabelled, and networks of one recipe share their "
            "mistakes."
        )
    if labels.rejected is None:
        return sentence
    return f"{sentence} {say_rejected(labels.rejected, count, comparisons, margin)}"


def say_rejected(
    rejected: Rejected, suspects: int, comparisons: Sequence[Comparison], margin: float
) -> str:
    """What people reject, and whether the verdict stands without it."""
    if rejected.images == 0:
        return "On none of the test images do more people choose another class than the label."
    said = [
        f"Of {rejected.images:,} test images on which more people choose another class than the "
        f"label, {rejected.suspected:,} are among these {suspects:,}."
    ]
    accuracy = []
    for comparison in comparisons:
        for network in (comparison.first, comparison.network):
            text = f"{rejected.accuracy[network.key].value:.2f} % ({network.title})"
            if text not in accuracy:
                accuracy.append(text)
    if accuracy:
        said.append(f"Without what people reject accuracy is {join_with_and(accuracy)}.")
    for comparison in comparisons:
        difference = rejected.differences[comparison.network.key]
        before = comparison.overall.difference
        same_verdict = difference.verdict is before.verdict
        same_size = difference.is_within_margin == before.is_within_margin
        stands = "The verdict stands" if same_verdict and same_size else "The verdict changes"
        seeds = len(comparison.overall.by_seed)
        verdict = name_verdict(difference, comparison.network, comparison.first, margin, seeds)
        said.append(f"{stands}: {verdict} ({in_points(difference.interval)}).")
    return " ".join(said)


def say_people(found: people.Scores, networks: Sequence[Network], seeds: int, level: float) -> str:
    """Whether networks err where people don't, and which mistakes a network mends."""
    said = []
    shares = []
    for outcome, share in found.share.items():
        shares.append(f"{share.value:.1f} % where {outcome}")
    said.append(f"Of people, the label is chosen by {join_with_and(shares)}.")
    if found.clear is None or found.unclear is None:
        return said[0]
    first, *others = networks
    sure = f"at least {found.clear.low:g} % of people agree with the label"
    errors = []
    for network in networks:
        errors.append(f"{found.clear.error[network.key].value:.2f} % ({network.title})")
    said.append(
        f"On the {found.clear.images:,} images on which {sure} the error is "
        f"{join_with_and(errors)}: mistakes that people hardly make."
    )
    trained = as_trained_here(seeds)
    for network in others:
        changes = []
        for group, where in ((found.clear, "on these"), (found.unclear, "on all others")):
            change = group.change[network.key]
            interval = change.interval
            changes.append(
                f"{interval.value:+.2f} points {where} ({bounds(interval)}, {say_p(change.p_holm)})"
            )
        contrast = found.contrast[network.key]
        differ = "differ" if contrast.p_holm < level else "are not shown to differ"
        said.append(
            f"From {first.title} to {network.title}{trained} the error changes by "
            f"{join_with_and(changes)}, p Holm-corrected; the two changes {differ} "
            f"(by {in_points(contrast.interval)}, {say_p(contrast.p_holm)})."
        )
    return " ".join(said)


@dataclass(frozen=True)
class SaidOfFailures:
    """The dossier in words."""

    transitions: str
    sureness: str  # "" where there is nothing to say
    common: str
    suspects: str
    people: str  # "" without people's answers


def say_failures(results: Results, dossier: Dossier) -> SaidOfFailures:
    """The dossier in words."""
    rules = results.setup.rules
    networks = [of_network.network for of_network in results.networks]
    images = results.images.test
    of_people = ""
    if dossier.people is not None:
        of_people = say_people(dossier.people, networks, len(results.setup.seeds), rules.level)
    return SaidOfFailures(
        transitions=" ".join(say_transitions(counts) for counts in dossier.transitions),
        sureness=" ".join(say_sureness(dossier.mistakes, rules.level)),
        common=say_common(dossier.common),
        suspects=say_suspects(dossier.labels, results.comparisons, images, rules.margin),
        people=of_people,
    )


def say_stress(stress: Outcome, margin: float) -> list[str]:
    """What the stress tests' table leaves open."""
    about_corruptions = [
        say_corruption(stress, margin),
        f"Corruptions as in CIFAR-10-C, {corruption_source(stress)}; means are over "
        f"{mean_is_over(stress)}, extra ones apart.",
        corruption_reference(stress),
    ]
    return [
        say_changes(stress),
        " ".join(filter(None, about_corruptions)),
        say_masking(stress),
        say_temperatures(stress),
        say_gates(stress),
    ]


def say_changes(stress: Outcome) -> str:
    """Which numbers of the table differ from the first network's beyond chance."""
    changes = changes_from_first(stress)
    if not changes:
        return ""
    surviving = beyond_chance(changes, stress.level)
    rows = f"Of {len(changes)} differences from {whose_differences(stress)} in the table"
    if not surviving:
        return f"{rows}, none is beyond chance (Holm-corrected over all of them)."
    named = name_changes(surviving, stress)
    return f"{rows}, Holm-corrected over all of them, these are beyond chance: {named}."


def say_changes_in_short(stress: Outcome) -> str:
    """How many do, and of the results chosen to be shown which."""
    changes = changes_from_first(stress)
    if not changes:
        return ""
    surviving = beyond_chance(changes, stress.level)
    count = "none" if not surviving else f"{len(surviving)}"
    are = "are" if len(surviving) > 1 else "is"
    sentence = (
        f"In the stress tests {count} of {len(changes)} differences from "
        f"{whose_differences(stress)} {are} beyond chance, Holm-corrected"
    )
    if not surviving:
        return f"{sentence}."
    chosen = [one for one in surviving if one.metric.shown]
    if not chosen:
        return f"{sentence}, none of them in the results that were chosen beforehand to be shown."
    named = name_changes(chosen, stress)
    return f"{sentence}. Of the results chosen beforehand to be shown: {named}."


def name_changes(changes: Sequence[Change], stress: Outcome) -> str:
    """Rows of the table with their changes; whose they are, where it may be several networks'."""
    named = []
    for one in changes:
        value = format(one.interval.value, f"+.{one.metric.digits}f")
        whose = "" if len(stress.networks) == 2 else f", {one.network.title}"
        named.append(f"{one.metric.title()}{whose} {value}")
    return "; ".join(named)


def whose_differences(stress: Outcome) -> str:
    """From the first network; with one seed, of networks as they were trained here."""
    first = stress.networks[0].network.title
    return f"{first}, of these networks as trained here," if stress.seeds() == 1 else first


def say_change(change: Change) -> str:
    """One row of the table that differs."""
    style = f"+.{change.metric.digits}f"
    value = format(change.interval.value, style)
    return (
        f"{change.metric.title()}, {change.network.title}: {value} "
        f"({bounds(change.interval, style)}, {say_p(change.p_holm)})"
    )


def say_direction(change: Change) -> str:
    """Which way it is better, in a word; "" where neither is."""
    gain = change.metric.better * change.interval.value
    if gain == 0:
        return ""
    return ", which is better" if gain > 0 else ", which is worse"


LEAST_P = 0.0001  # what is smaller is not known so well: tests hold but roughly so far out


def say_p(p: float) -> str:
    return f"p < {LEAST_P:g}" if p < LEAST_P else f"p = {p_of_table(p)}"


def p_of_table(p: float) -> str:
    """Two digits, and a third where it tells on which side of the usual level of 5 % p lies."""
    if p < LEAST_P:
        return f"<{LEAST_P:g}"
    return f"{p:#.3g}" if f"{p:.2g}" == "0.05" else f"{p:.2g}"


def say_temperatures(stress: Outcome) -> str:
    """Whose temperature is anywhere, or as far as it may go; "" where none is."""
    sentences = []
    of_a_seed = "" if stress.seeds() == 1 else ", of one seed or more,"
    anywhere = []
    largest = []
    for one in stress.networks:
        if one.calibration.nothing_says_how_unsure:
            anywhere.append(one.network.title)
        if one.calibration.is_temperature_largest:
            largest.append(one.network.title)
    if anywhere:
        sentences.append(
            f"The temperature of {join_with_and(anywhere)}{of_a_seed} is where its search happened "
            "to end: all validation images are answered correctly, so that they do not say how "
            "unsure to be."
        )
    if largest:
        sentences.append(
            f"The temperature of {join_with_and(largest)}{of_a_seed} is the largest that was "
            "tried: the logits say next to nothing of what the validation images show."
        )
    return " ".join(sentences)


def say_gates(stress: Outcome) -> str:
    """What is lost when gates no longer answer to the image; "" where no network has any."""
    sentences = []
    for one in stress.networks:
        if one.gates is None:
            continue
        difference = one.gates.change
        interval = difference.interval
        sentences.append(
            f"With all of {one.network.title}'s gates held at their means, accuracy is "
            f"{one.gates.accuracy_at_means.mean():.2f} % in place of "
            f"{one.gates.accuracy_as_learnt.mean():.2f} %: that the gates answer to the image is "
            f"worth {interval.value:+.2f} points to the trained network ({bounds(interval)}, "
            f"{say_p(difference.p_holm)}{say_correction(difference)})."
        )
    return " ".join(sentences)


def corruption_source(stress: Outcome) -> str:
    """Where the corrupted images come from."""
    return "the published arrays" if stress.official else f"made by {PROGRAM}"


def mean_is_over(stress: Outcome) -> str:
    """Which corruptions, for "the mean over …"."""
    count = len(stress.benchmark_corruptions())
    some = "" if count == BENCHMARK_SIZE else f"{count} of "
    return f"{some}the benchmark's {BENCHMARK_SIZE} corruptions"


def corruption_reference(stress: Outcome) -> str:
    """A published result to hold the mean against, where it is over the benchmark's images."""
    if not stress.official or len(stress.benchmark_corruptions()) < BENCHMARK_SIZE:
        return ""
    return (
        f"RobustBench's standard WRN-28-10 has {PUBLISHED_ACCURACY} % there, over all "
        "10,000 images."
    )


def say_corruption(stress: Outcome, margin: float) -> str:
    """The verdicts on the mean over the benchmark's corruptions."""
    first = stress.networks[0].network
    sentences = []
    for one in stress.networks:
        change = one.corruptions.change
        if change is not None:
            verdict = name_verdict(change, one.network, first, margin, stress.seeds())
            sentences.append(
                f"Under corruption, {verdict}: {in_points(change.interval)} "
                f"({say_p(change.p_holm)}; against the margin {say_p(change.margin_p_holm)})."
            )
    return " ".join(sentences)


def say_masking(stress: Outcome) -> str:
    """Whether the attack overstates what networks withstand."""
    masked = [one.network.title for one in stress.networks if one.attacks.is_masked()]
    if masked:
        it = "it" if len(masked) == 1 else "them"
        return (
            f"What was made for other networks fools {join_with_and(masked)} more than what "
            f"was made for {it}: a sign of masked gradients, which hide what is not withstood."
        )
    return (
        "What was made for other networks is not shown to fool any more than what was made for it: "
        "no sign of masked gradients."
    )
