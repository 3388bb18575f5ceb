"""Every key of an adapter against the tensors of its base: what becomes of which tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from unmergeable.checkpoint.adapter.file import NOT_GATHERED, AdapterFile
from unmergeable.checkpoint.adapter.keys import Keys, sort_keys, unwrapped
from unmergeable.checkpoint.adapter.names import Names
from unmergeable.checkpoint.adapter.settings import MERGE_WITH_PEFT, AdapterSettings
from unmergeable.checkpoint.adapter.updates import Bias, Experts, Hadamard, Kronecker, LowRank, Rows, Shared, Update
from unmergeable.checkpoint.index import TensorSpec
from unmergeable.checkpoint.source import TensorSource
from unmergeable.errors import BadInput, CheckpointError, Mismatch


@dataclass
class Changes:
    """What becomes of the base's tensors, by their names on disk; and keys of tensors that it lacks, by name in memory.

    Attributes:
        updates: computed on the base's tensor, or on what replaces it.
        replacements: keys of what is stored instead.
        unknown: keys of tensors that match none of the base's, by their names in memory.
        unmatched: updates of weights that the base does not store, by their names in memory: trained rows, or None.
    """

    updates: dict[str, Update] = field(default_factory=dict)
    replacements: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, Rows | None] = field(default_factory=dict)


def match(adapter: AdapterFile, base: TensorSource, settings: AdapterSettings, names: Names) -> Changes:
    """Match every key of the adapter with a tensor of its base.

    Raises:
        CheckpointError: a key of another kind of adapter, or an incomplete update.
        Mismatch: a module that the base lacks, or one of another shape.
    """
    return _Matching(adapter, base, settings, names).run()


class _Matching:
    def __init__(self, adapter: AdapterFile, base: TensorSource, settings: AdapterSettings, names: Names) -> None:
        self.adapter = adapter
        self.base = base
        self.settings = settings
        self.names = names
        self.keys: Keys = sort_keys(adapter.specs, settings.kind, adapter.name)
        self.changes = Changes()

    def run(self) -> Changes:
        depths = self._wrappings()
        for wrapped, keys in self.keys.updates.items():
            module, depth = unwrapped(wrapped)
            if self._is_parameter(module):
                self._add_parameter(module, depths[module] - 1 - depth, keys)
            else:
                self._add_module(module, keys)
        self._require_one_orientation()
        for target, key in self.keys.tensors.items():
            self._add_tensor(target, key)
        return self.changes

    # Modules

    def _add_module(self, module: str, keys: Mapping[str, str]) -> None:
        keys = dict(keys)
        bias = keys.pop("bias", None)
        name = self.names.match(f"{module}.weight")
        if name is None:
            rows = self._rows(module, keys["tokens"]) if "tokens" in keys else None
            self.changes.unmatched[f"{module}.weight"] = rows
            return
        update = self._update(module, keys, self.base.spec(name))
        if update is not None:
            self._put(name, update)
        if bias is not None:
            self._add_bias(module, bias)

    def _put(self, name: str, update: Update) -> None:
        earlier = self.changes.updates.get(name)
        if earlier is not None:
            raise Mismatch(
                f"{self.adapter.name}: modules {earlier.module!r} and {update.module!r} are the same tensor {name!r}; "
                f"{MERGE_WITH_PEFT}."
            )
        self.changes.updates[name] = update

    def _add_bias(self, module: str, key: str) -> None:
        name = self.names.match(f"{module}.bias")
        if name is None and self.names.match(f"{module}.weight") is not None:
            raise Mismatch(
                f"{self.adapter.name}: lora_bias adds a bias to {module!r}, where {self.base.description} has none: "
                "peft cannot merge it either; train the adapter with lora_bias=False."
            )
        if name is None or self.base.spec(name).shape != self.adapter.specs[key].shape:
            raise Mismatch(self._no_tensor(f"the bias of module {module!r}"))
        self._put(name, Bias(module, key, self.settings.scale(module)))

    def _update(self, module: str, keys: Mapping[str, str], weight: TensorSpec) -> Update | None:
        if "tokens" in keys:
            return self._rows(module, keys["tokens"], weight)
        if self.settings.kind == "VERA":
            return self._shared(module, keys, weight)
        if self.settings.kind in ("LOHA", "LOKR"):
            return self._product(module, keys, weight)
        return self._low_rank(module, keys, weight)

    def _rows(self, module: str, key: str, weight: TensorSpec | None = None) -> Rows:
        indices = self.settings.tokens_of(module)
        rows = self.adapter.specs[key].shape
        fits = weight is None or (weight.shape[1:] == rows[1:] and max(indices, default=0) < weight.shape[0])
        if not indices or len(rows) != 2 or rows[0] != len(indices) or not fits:
            raise Mismatch(
                f"{self.adapter.name}: module {module!r} has {list(rows)} for {len(indices)} trained tokens"
                f"{'' if weight is None else f' of {weight}'}; {self._remedy}."
            )
        return Rows(module, key, indices)

    def _low_rank(self, module: str, keys: Mapping[str, str], weight: TensorSpec) -> LowRank | None:
        is_adaptive = self.settings.kind == "ADALORA"
        is_embedding = "embedding_a" in keys
        wanted = ["embedding_a", "embedding_b"] if is_embedding else ["a", "b"]
        wanted += ["energy"] if is_adaptive else []
        self._require_parts(module, keys, wanted, optional=("magnitude",))
        key_a, key_b = (keys[part] for part in wanted[:2])
        a, b = self.adapter.specs[key_a].shape, self.adapter.specs[key_b].shape
        rank = (a[0] if a else 0) if is_adaptive else self.settings.rank_of(module)
        if is_adaptive and rank == 0:
            return None  # AdaLoRA has dropped every rank of this module
        if 0 in a or 0 in b:
            raise CheckpointError(f"{self.adapter.name}: module {module!r} has A {list(a)} and B {list(b)}: "
                                  f"{NOT_GATHERED}.")  # fmt: skip
        if len(a) < 2 or len(b) < 2 or a[0] != rank or b[1] != rank or any(size != 1 for size in b[2:]):
            raise Mismatch(f"{self.adapter.name}: module {module!r} has A {list(a)} and B {list(b)} for rank {rank}.")
        fan_in = TensorSpec("U8", a[1:]).numel
        plain = weight.shape == (b[0], *a[1:])
        transposed = len(a) == 2 and weight.shape == (fan_in, b[0])
        if not plain and not transposed:
            raise Mismatch(self._other_shape(module, [b[0], *a[1:]], weight))
        is_transposed = transposed and (not plain or is_embedding or self.settings.fan_in_fan_out)
        magnitude = keys.get("magnitude")
        if magnitude is not None and self.adapter.specs[magnitude].numel != b[0]:
            raise Mismatch(f"{self.adapter.name}: module {module!r} has {self.adapter.specs[magnitude]} magnitudes "
                           f"for {b[0]} rows.")  # fmt: skip
        scale = self.settings.adaptive_scale(rank) if is_adaptive else self.settings.scale(module)
        return LowRank(module, key_a, key_b, scale, is_transposed, magnitude, keys.get("energy"))

    def _shared(self, module: str, keys: Mapping[str, str], weight: TensorSpec) -> Shared:
        self._require_parts(module, keys, ["lambda_b", "lambda_d"])
        missing = {"vera_A", "vera_B"} - set(self.keys.shared)
        if missing:
            raise CheckpointError(f"{self.adapter.name}: {sorted(missing)[0]} is missing; {MERGE_WITH_PEFT}.")
        rows, rank = (self.adapter.specs[keys[part]].numel for part in ("lambda_b", "lambda_d"))
        a, b = (self.adapter.specs[self.keys.shared[name]].shape for name in ("vera_A", "vera_B"))
        plain = len(weight.shape) == 2 and weight.shape[0] == rows
        transposed = len(weight.shape) == 2 and weight.shape[1] == rows
        is_transposed = transposed and (not plain or self.settings.fan_in_fan_out)
        columns = weight.shape[0 if is_transposed else -1]
        fits = len(a) == len(b) == 2 and a[0] == b[1] == rank and a[1] >= columns and b[0] >= rows
        if not (plain or transposed) or not fits:
            raise Mismatch(self._other_shape(module, [rows, columns], weight))
        return Shared(
            module, self.keys.shared["vera_A"], self.keys.shared["vera_B"], keys["lambda_d"], keys["lambda_b"],
            is_transposed,
        )  # fmt: skip

    def _product(self, module: str, keys: Mapping[str, str], weight: TensorSpec) -> Hadamard | Kronecker:
        shapes = {part: self.adapter.specs[key].shape for part, key in keys.items()}
        is_kronecker = self.settings.kind == "LOKR"
        wanted = []
        for factor in ("w1", "w2"):
            wanted += [factor] if is_kronecker and factor in keys else [f"{factor}_a", f"{factor}_b"]
        self._require_parts(module, keys, wanted)

        def size(factor: str) -> tuple[int, int]:
            if factor in shapes:
                return shapes[factor][0], TensorSpec("U8", shapes[factor][1:]).numel
            left, right = shapes[f"{factor}_a"], shapes[f"{factor}_b"]
            fits = len(left) == len(right) == 2 and left[1] == right[0]
            return (left[0], right[1]) if fits else (0, 0)

        first, second = size("w1"), size("w2")
        made = (first[0] * second[0], first[1] * second[1]) if is_kronecker else first
        flat = (weight.shape[0], TensorSpec("U8", weight.shape[1:]).numel) if weight.shape else (0, 0)
        if made != flat or (not is_kronecker and first != second):
            raise Mismatch(self._other_shape(module, list(made), weight))
        kind = Kronecker if is_kronecker else Hadamard
        return kind(module, dict(keys), self.settings.scale(module))

    def _require_one_orientation(self) -> None:
        """For a square weight only ``fan_in_fan_out`` tells W from W^T, and peft saves one flag for all layers.

        An adapter over layers of both kinds holds the flag of whichever came last, so the flag is believed only while
        no weight that is not square contradicts it.
        """
        matrices = {
            name: update
            for name, update in self.changes.updates.items()
            if isinstance(update, LowRank)
            and len(self.base.spec(name).shape) == 2
            and "lora_embedding_A" not in update.key_a
        }
        flag = self.settings.fan_in_fan_out
        square = [name for name in matrices if len(set(self.base.spec(name).shape)) == 1]
        contrary = [name for name in matrices if name not in square and matrices[name].is_transposed != flag]
        if square and contrary:
            raise CheckpointError(
                f"{self.adapter.name}: fan_in_fan_out is {flag}, which {contrary[0]!r} contradicts, so the "
                f"orientation of the square {square[0]!r} is unknown; {MERGE_WITH_PEFT}."
            )

    # Parameters that are not the weight of a module

    def _wrappings(self) -> dict[str, int]:
        depths: dict[str, int] = {}
        for wrapped in self.keys.updates:
            module, _ = unwrapped(wrapped)
            depths[module] = depths.get(module, 0) + 1
        return depths

    def _is_parameter(self, module: str) -> bool:
        ends = [target.rpartition(".")[0] for target in self.settings.parameters]
        named = any(end and f".{module}".endswith(f".{end}") for end in ends)
        return named or ("" in ends and self.names.match(f"{module}.weight") is None)

    def _add_parameter(self, module: str, number: int, keys: Mapping[str, str]) -> None:
        """The ``number``-th adapted parameter of a module: peft wraps them in the order that the module has them in."""
        skeleton = self.names.skeleton
        if skeleton is None:
            raise BadInput(f"{self.adapter.name}: target_parameters: {self.names.why_not.rstrip('.')}; "
                           f"{MERGE_WITH_PEFT}.")  # fmt: skip
        inside = skeleton.module(module)
        adapted = [
            name
            for name, _ in (() if inside is None else inside.named_parameters(recurse=False))
            if any(f".{module}.{name}".endswith(f".{target}") for target in self.settings.parameters)
        ]
        if not 0 <= number < len(adapted):
            raise Mismatch(self._no_tensor(f"module {module!r}"))
        name = f"{module}.{adapted[number]}"
        parameter = skeleton.parameter(name)
        assert parameter is not None, "the module has it"
        self._require_parts(module, keys, ["a", "b"])
        a, b = (self.adapter.specs[keys[part]].shape for part in ("a", "b"))
        rank = self.settings.rank_of(name)
        if parameter.dim() == 2:
            matched = self.names.match(name)
            if matched is None or (a, b) != ((rank, parameter.shape[1]), (parameter.shape[0], rank)):
                raise Mismatch(self._other_shape(name, [b[0], *a[1:]], TensorSpec("F32", tuple(parameter.shape))))
            self._put(matched, LowRank(name, keys["a"], keys["b"], self.settings.scale(name)))
            return
        experts, first, second = parameter.shape
        is_transposed = bool(getattr(inside, "is_transposed", False))
        rows, columns = (second, first) if is_transposed else (first, second)
        if (a, b) != ((rank * experts, columns), (rows, rank * experts)):
            raise Mismatch(self._other_shape(name, [experts, rows, columns], TensorSpec("F32", tuple(parameter.shape))))
        update = Experts(name, keys["a"], keys["b"], self.settings.scale(name), experts, is_transposed)
        self._put_experts(name, update, tuple(parameter.shape))

    def _put_experts(self, name: str, update: Experts, shape: tuple[int, ...]) -> None:
        whole = self.names.match(name)
        if whole is not None and self.base.spec(whole).shape == shape:
            self._put(whole, update)
            return
        assert self.names.skeleton is not None, "it was asked for the parameter"
        for region in self.names.skeleton.regions(name):
            part = self.names.find(region.name)
            size = (len(region.y), len(region.x)) if region.is_transposed else (len(region.x), len(region.y))
            if part is None or self.base.spec(part).shape != size:
                raise Mismatch(self._no_tensor(f"{region.name!r}, a part of {name!r},"))
            rows, columns = (region.y, region.x) if update.is_transposed else (region.x, region.y)
            is_transposed = update.is_transposed != region.is_transposed
            self._put(part, Experts(name, update.key_a, update.key_b, update.scale, update.experts, is_transposed,
                                    region.expert, rows, columns))  # fmt: skip

    # Whole tensors

    def _add_tensor(self, target: str, key: str) -> None:
        name = self.names.match(target)
        if name is None:
            self.changes.unknown[target] = key
            return
        if self.adapter.specs[key].shape != self.base.spec(name).shape:
            raise Mismatch(
                f"{self.adapter.name}: {target!r} is {self.adapter.specs[key]} but {self.base.spec(name)} in "
                f"{self.base.description}; a resized model cannot be merged here, {MERGE_WITH_PEFT}."
            )
        self.changes.replacements[name] = key

    # Messages

    @property
    def _remedy(self) -> str:
        return f"pass the base it was trained on, or {MERGE_WITH_PEFT}"

    def _no_tensor(self, what: str) -> str:
        return f"{self.adapter.name}: {what} matches no tensor of {self.base.description}; {self._remedy}."

    def _other_shape(self, module: str, shape: list[int], weight: TensorSpec) -> str:
        return f"{self.adapter.name}: module {module!r} updates {shape} but the base has {weight}; {self._remedy}."

    def _require_parts(
        self, module: str, keys: Mapping[str, str], wanted: list[str], optional: tuple[str, ...] = ()
    ) -> None:
        held = set(keys) - set(optional)
        if held != set(wanted):
            raise CheckpointError(f"{self.adapter.name}: module {module!r} has {sorted(held)} where {wanted} belong.")
