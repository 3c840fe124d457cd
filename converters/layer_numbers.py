"""What in a GGUF, and in llama.cpp, hangs on the numbers of a model's layers, and what becomes of it when some go.

Most is metadata: arrays with a value for each layer, the number of dense layers at the front. Some is not in the file:
llama.cpp takes a layer's kind from its number, mostly every so-manieth (src/models/*.cpp, read from its release in
llama-cpp-python 0.3.36). Where it also reads an array, the array is written; where not, layers that would change
their kind are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmcompress.errors import GGUFError, PlanError, shown
from llmcompress.gguf.value import Metadata, Value, ValueType, array, u32

INDEXED = "attention.indexer.types"
# Arrays with a value for each layer, all but xielu's below the architecture's name, and those that have others.
OF_LAYERS = {
    "attention.head_count", "attention.head_count_kv", "attention.sliding_window_pattern", "attention.recurrent_layers",
    "feed_forward_length", "expert_feed_forward_length", "expert_used_count", "swiglu_clamp_exp", "swiglu_clamp_shexp",
    "xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps", "activation_sparsity_scale",
}  # fmt: skip
NOT_OF_LAYERS = {"rope.dimension_sections", "classifier.output_labels"}
SLIDES, RECURS = "attention.sliding_window_pattern", "attention.recurrent_layers"
# Every so-manieth layer sees all tokens, where the array does not say which.
SLIDING = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "cohere2": 4,
    "olmo2": 4,
    "exaone4": 4,
    "gpt-oss": 2,
    "llama4": 4,
}
RECURRENT = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}
# No array says these: every so-manieth layer is another, or those from a number on are.
STEPS = {"smollm3": {"turns its queries (rope)": 4}, "llama4": {"turns its queries (rope)": 4}}
STEP_KEYS = {"interleave_moe_layer_step": "has experts"}
BORDERS = {"gemma3n": {"has sparse activations": 10, "has keys of its own": 20}}
# Numbers of layers by which llama.cpp tells models apart that compute something else.
COUNTS: dict[str, tuple[tuple[str, frozenset[int]], ...]] = {
    "deepseek2": (
        ("queries without a low rank", frozenset({26, 27})),
        ("another router", frozenset({47, 48})),
    ),
    "command-r": (("norms of queries and keys", frozenset(range(64, 1024))),),
    "exaone4": (("a sliding window", frozenset({64})),),
    "gemma2": (("another scale of queries", frozenset({46})),),
    "gemma3": (("another scale of queries", frozenset({62})),),
}


@dataclass(frozen=True)
class KeptLayers:
    """The layers that stay, by their numbers in the file, in order; `count` is how many there were."""

    architecture: str
    count: int
    kept: tuple[int, ...]

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.count) if layer not in set(self.kept))

    def below(self, border: int) -> int:
        """How many stay of the first `border` layers."""
        return sum(layer < border for layer in self.kept)


def kept_layers(architecture: str, count: int, dropped: Sequence[int]) -> KeptLayers:
    """Raises PlanError for numbers that name no layer, and where none would stay."""
    wrong = sorted(layer for layer in dropped if not 0 <= layer < count)
    if wrong or not dropped:
        named = f"there is no layer {wrong[0]}" if wrong else "name a layer to drop"
        raise PlanError(f"--layers: {named}; the model has layers 0 to {count - 1}")
    if len(set(dropped)) < len(dropped):
        raise PlanError("--layers: names a layer twice")
    kept = tuple(layer for layer in range(count) if layer not in set(dropped))
    if not kept:
        raise PlanError(f"--layers: drops all {count} layers; keep one")
    return KeptLayers(architecture, count, kept)


def renumbered(metadata: Metadata, layers: KeptLayers) -> Metadata:
    """The metadata of the model without the dropped layers. Raises PlanError where llama.cpp would compute a layer that
    stays in another way."""
    own, changed = f"{layers.architecture}.", dict(metadata)
    for key, value in metadata.items():
        if key.startswith((own, "xielu.")) and value.type is ValueType.ARRAY:
            changed[key] = _cut(key, key.removeprefix(own), value, layers)
    _refuse_other_counts(layers)
    for what, same in _kinds(metadata, layers):
        moved = [layer for number, layer in enumerate(layers.kept) if same(layer) != same(number)]
        if moved:
            raise PlanError(
                f"--layers: llama.cpp goes by a layer's number for whether it {what}, and layer {moved[0]} would become "
                f"another kind as number {layers.kept.index(moved[0])}; drop layers so that those behind keep their kind"
            )
    changed |= _patterns(metadata, changed, layers)
    changed |= {own + key: value for key, value in _borders(metadata, layers).items()}
    return changed | {f"{own}block_count": u32(len(layers.kept))}


def _number(metadata: Mapping[str, Value], key: str, default: int) -> int:
    held = metadata.get(key)
    if held is None:
        return default
    if type(held.value) is not int or held.value < 0:
        raise GGUFError(
            f"{key} is {shown(held.value)}, it must be a whole number; make or fetch the file again"
        )
    return held.value


def _cut(key: str, name: str, value: Value, layers: KeptLayers) -> Value:
    if name == INDEXED:  # layers that predict further tokens have no value
        _check_choices(value.value, layers)
        return array(value.item, [value.value[layer] for layer in layers.kept if layer < len(value.value)])
    if name in OF_LAYERS and len(value.value) != layers.count:
        raise GGUFError(
            f"{key} has {len(value.value)} values, there are {layers.count} layers; make or fetch the file again"
        )
    if name in OF_LAYERS:
        return array(value.item, [value.value[layer] for layer in layers.kept])
    if name not in NOT_OF_LAYERS and len(value.value) == layers.count:
        raise PlanError(
            f"{key} has as many values as there are layers, and it is not known whether they are the layers'; drop the "
            "layers from the model that the file was made from: llmcompress prune MODEL --method layers"
        )
    return value


def _check_choices(indexed: Sequence[object], layers: KeptLayers) -> None:
    """A layer without an indexer attends to the tokens that the last layer with one has chosen."""
    for layer in range(len(indexed)):
        chooses = max((other for other in range(layer + 1) if indexed[other]), default=0)
        if layer in layers.kept and chooses in layers.dropped:
            raise PlanError(
                f"--layers: layer {layer} takes the tokens that layer {chooses} chooses, which must stay"
            )


def _refuse_other_counts(layers: KeptLayers) -> None:
    for what, counts in COUNTS.get(layers.architecture, ()):
        if (layers.count in counts) != (len(layers.kept) in counts):
            raise PlanError(
                f"--layers: of {len(layers.kept)} layers in place of {layers.count} llama.cpp takes a {layers.architecture} for "
                f"one {'with' if len(layers.kept) in counts else 'without'} {what}; drop another number of layers"
            )


def _kinds(metadata: Metadata, layers: KeptLayers) -> list[tuple[str, Callable[[int], bool]]]:
    """What llama.cpp computes by a layer's number alone."""
    name = layers.architecture
    steps = dict(STEPS.get(name, {}))
    if name == "llama4" and _number(metadata, "llama4.attention.sliding_window", 8192) == 0:
        steps = {}  # all layers are turned
    for key, what in STEP_KEYS.items():
        steps[what] = _number(metadata, f"{name}.{key}", 1)
    found: list[tuple[str, Callable[[int], bool]]] = [
        (what, lambda layer, step=step: step > 0 and (layer + 1) % step == 0) for what, step in steps.items()
    ]
    for what, border in BORDERS.get(name, {}).items():
        found.append((what, lambda layer, border=border: layer < border))
    return found


def _patterns(metadata: Metadata, changed: Metadata, layers: KeptLayers) -> Metadata:
    """Arrays for what was every so-manieth layer and is so no more."""
    name, found = layers.architecture, {}
    for suffix, defaults, period_key in (
        (SLIDES, SLIDING, SLIDES),
        (RECURS, RECURRENT, "full_attention_interval"),
    ):
        key = f"{name}.{suffix}"
        held = metadata.get(key)
        if name not in defaults or (held and held.type is ValueType.ARRAY):
            continue
        period = _number(metadata, f"{name}.{period_key}", defaults[name])
        after = layers.count - _number(metadata, f"{name}.nextn_predict_layers", 0)  # predict further tokens
        flags = [layer < after and (period == 0 or layer % period < period - 1) for layer in layers.kept]
        usual = [number < layers.below(after) and (period == 0 or number % period < period - 1)
                 for number in range(len(flags))]  # fmt: skip
        if flags != usual:
            found[key] = array(ValueType.BOOL, flags)
    return found


def _borders(metadata: Metadata, layers: KeptLayers) -> Metadata:
    """Numbers of layers at the front or at the end."""
    name, found = layers.architecture, {}
    if f"{name}.leading_dense_block_count" in metadata:
        dense = _number(metadata, f"{name}.leading_dense_block_count", 0)
        found["leading_dense_block_count"] = u32(layers.below(dense))
    for key in ("attention.shared_kv_layers", "nextn_predict_layers"):
        if f"{name}.{key}" in metadata:
            first = layers.count - _number(metadata, f"{name}.{key}", 0)
            found[key] = u32(len(layers.kept) - layers.below(first))
            lent = {first - 2, first - 1} if key == "attention.shared_kv_layers" else set()
            if found[key].value and lent - set(layers.kept):
                raise PlanError(
                    f"--layers: layers from {first} on take the keys and values of layers {first - 2} and {first - 1}, "
                    "which must stay"
                )
    return found
