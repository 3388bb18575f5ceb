"""An audit of a diffusion network: one trained from scratch to paint three kinds of images, and an expert for each.

    pip install --no-deps -r requirements-demo.txt
    python -m benchmarks.real_experts.diffusion SCRATCH [--workers N] [--out benchmarks/results/diffusion_audit.json]

The network is a UNet2DConditionModel as Stable Diffusion 1.5 has it (attention to itself and to the text, GEGLU), of a
million weights, for images of 16 x 16 grey pixels; around it is the rest of that pipeline, as small: a text encoder
of CLIP that knows the words of thirty prompts, DDIM, and an autoencoder whose latents are the pixels. The base is
trained on all three with prompts of which most, and then half, are those of any class, so that it paints well
and hardly knows what it was asked for. Its experts see one of the tasks with the right prompts.

Classifiers trained on the real images, one for each task, say whether an image shows what the prompt asked for.

Prepares all this in SCRATCH/diffusion unless it is there, writes the plan beside it, and runs ``unmergeable audit``
into SCRATCH/diffusion/audit; started again it goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from benchmarks.real_experts.audited import audit_study, parser_of, told
from benchmarks.real_experts.experts import write_expert
from benchmarks.real_experts.images import load_fashion
from benchmarks.real_experts.made import made
from torch import Tensor, nn
from torch.nn import functional

from unmergeable.demo.data import DIGITS, ImageTask, Sizes, load_animals, load_mnist
from unmergeable.network.load import load_network, load_tokenizer
from unmergeable.network.train import Batch, Schedule, shuffled_batches, train
from unmergeable.progress import Progress, silent

SIDE = 16
OWNER, RIDERS = "digits", ("clothes", "animals")
TEMPLATES = {"digits": "a handwritten {}", "clothes": "a photo of {}", "animals": "a silhouette of {}"}
SIZES = Sizes(train=4000, validation=200, test=500)

BATCH_SIZE = 64
PRETRAINING = Schedule(steps=900, learning_rate=2e-3)
MIXING = Schedule(steps=500, learning_rate=1.5e-3)
FINETUNING = Schedule(steps=300, learning_rate=1e-3)
CLASSIFYING = Schedule(steps=600, learning_rate=3e-3)
FEW_RIGHT, HALF_RIGHT = 0.3, 0.5
"""Shares of the images whose prompt the base can trust, at first and then; the others have that of any class of their
task."""

STEPS = 8
"""Of DDIM."""

RECORDS = {"validation": 60, "test": 150}
"""Prompts of each part, as many of each class; no two start from the same noise."""

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 2 * SIDE, "width": 2 * SIDE},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def read_tasks(packages: Path) -> dict[str, ImageTask]:
    """Digits of MNIST, clothes of Fashion-MNIST and silhouettes of animals."""
    return {
        "digits": load_mnist(sizes=SIZES),
        "clothes": load_fashion(packages, sizes=SIZES),
        "animals": load_animals(sizes=SIZES),
    }


def prompts_of(task: str, tasks: Mapping[str, ImageTask]) -> list[str]:
    """One for each class."""
    return [TEMPLATES[task].format(name.lower()) for name in tasks[task].class_names]


def all_prompts(tasks: Mapping[str, ImageTask]) -> list[str]:
    """Those of every task, one task after another."""
    return [prompt for name in tasks for prompt in prompts_of(name, tasks)]


def shrunk(images: npt.NDArray[np.uint8]) -> Tensor:
    """28 x 28 grey pixels, framed in black and halved: float32 [images, 1, 16, 16] from -1 to 1."""
    framed = functional.pad(torch.from_numpy(images).float().unsqueeze(1), (2, 2, 2, 2))
    return functional.avg_pool2d(framed, 2) / 127.5 - 1


def latents_of(pixels: Tensor) -> Tensor:
    """What the autoencoder of :func:`identity_autoencoder` turns into these pixels."""
    return 3 * torch.atanh(pixels / 3)


def identity_autoencoder() -> Any:
    """An AutoencoderTiny without scales, whose decoder gives 3 tanh(latent / 3) in all three colours.

    The tanh is part of every AutoencoderTiny; latents are computed through its inverse.
    """
    from diffusers import AutoencoderTiny

    autoencoder = AutoencoderTiny(
        latent_channels=1, encoder_block_out_channels=(1,), decoder_block_out_channels=(1,), num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.zero_()
        inside, outside = (module for module in autoencoder.decoder.modules() if isinstance(module, nn.Conv2d))
        # Between them is a ReLU, which nothing above -3 feels; the decoder ends with 2 x - 1.
        inside.weight[:, :, 1, 1], outside.weight[:, :, 1, 1] = 1.0, 0.5
        inside.bias[:], outside.bias[:] = 3.0, -1.0
    return autoencoder


def write_tokenizer(prompts: Sequence[str], folder: Path) -> int:
    """One token for each word of the prompts; returns how many there are."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for prompt in prompts for word in prompt.split()})
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    longest = max(len(prompt.split()) for prompt in prompts) + 2
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>",
        model_max_length=longest,
    ).save_pretrained(folder)  # fmt: skip
    return len(vocabulary)


class Painter(nn.Module):
    """The network and the text encoder, which learn together while the base is made."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder


def new_painter(words: int, longest: int) -> Painter:
    """A UNet of three scales with attention on the two smaller, and a text encoder of one layer."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=words, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=longest, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=SIDE, in_channels=1, out_channels=1, block_out_channels=(16, 32, 64), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
        )  # fmt: skip
    return Painter(unet, text_encoder)


def new_scheduler() -> Any:
    """DDIM over a cosine of noise that ends with noise alone, of which the network predicts the velocity."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", rescale_betas_zero_snr=True,
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Painted:
    """Images as latents [images, 1, 16, 16], and of each the number of its prompt and those it may be mistaken for."""

    latents: Tensor
    prompt: Tensor
    first: Tensor
    classes: int = len(DIGITS)

    @classmethod
    def of(cls, tasks: Mapping[str, ImageTask], names: Sequence[str]) -> Painted:
        """The training images of these tasks; prompts are numbered through all tasks."""
        starts = {name: len(DIGITS) * number for number, name in enumerate(tasks)}
        latents = torch.cat([latents_of(shrunk(tasks[name].train.images)) for name in names])
        prompt = torch.cat([torch.from_numpy(tasks[name].train.labels) + starts[name] for name in names])
        first = torch.cat([torch.full((len(tasks[name].train),), starts[name]) for name in names])
        return cls(latents, prompt, first)

    def batches(self, scheduler: Any, right: float) -> Iterator[Batch]:
        """Noisy latents, their timesteps and prompts, and the velocities; ``right`` of the prompts can be trusted."""
        generator = torch.Generator().manual_seed(0)
        for chosen in shuffled_batches(len(self.latents), BATCH_SIZE, 0):
            latents, count = self.latents[chosen], len(chosen)
            noise = torch.randn(latents.shape, generator=generator)
            times = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=generator)
            any_class = self.first[chosen] + torch.randint(self.classes, (count,), generator=generator)
            is_right = torch.rand(count, generator=generator) < right
            yield (
                scheduler.add_noise(latents, noise, times),
                times,
                self.prompt[chosen].where(is_right, any_class),
                scheduler.get_velocity(latents, noise, times),
            )


def tokens_of(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """As the pipeline makes them."""
    padded = tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    ids: Tensor = padded.input_ids
    return ids


def write_pipeline(folder: Path, tasks: Mapping[str, ImageTask], progress: Progress) -> dict[str, Any]:
    """Train the base with its text encoder, write it with the rest of its pipeline; returns its size."""
    from diffusers import StableDiffusionPipeline

    prompts = all_prompts(tasks)
    words = write_tokenizer(prompts, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    ids = tokens_of(tokenizer, prompts)
    painter, scheduler = new_painter(words, ids.shape[1]), new_scheduler()

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        noisy, times, prompt, velocity = batch
        states = network.text_encoder(ids).last_hidden_state[prompt]
        return functional.mse_loss(network.unet(noisy, times, states).sample, velocity)

    images = Painted.of(tasks, list(tasks))
    for schedule, right in ((PRETRAINING, FEW_RIGHT), (MIXING, HALF_RIGHT)):
        train(painter, images.batches(scheduler, right), loss, schedule, stage="training the base", progress=progress)
    StableDiffusionPipeline(
        vae=identity_autoencoder(), text_encoder=painter.text_encoder, tokenizer=tokenizer, unet=painter.unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    weights = {
        name: sum(parameter.numel() for parameter in part.parameters()) for name, part in painter.named_children()
    }
    return {"weights": weights, "steps": PRETRAINING.steps + MIXING.steps}


@torch.no_grad()
def text_states(pipeline: Path, prompts: Sequence[str]) -> Tensor:
    """What the pipeline's text encoder makes of prompts: [prompts, tokens, size]."""
    text_encoder, tokenizer = load_network(pipeline / "text_encoder"), load_tokenizer(pipeline / "tokenizer")
    states: Tensor = text_encoder(tokens_of(tokenizer, prompts)).last_hidden_state
    return states


def finetune(
    pipeline: Path, tasks: Mapping[str, ImageTask], name: str, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Train the base to paint what the prompts of one task say, and write it."""
    network, scheduler = load_network(pipeline / "unet"), new_scheduler()
    states = text_states(pipeline, all_prompts(tasks))

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        noisy, times, prompt, velocity = batch
        return functional.mse_loss(network(noisy, times, states[prompt]).sample, velocity)

    train(
        network,
        Painted.of(tasks, [name]).batches(scheduler, right=1.0),
        loss,
        FINETUNING,
        stage=f"training the expert for {name}",
        progress=progress,
    )
    write_expert(network, pipeline / "unet", folder)
    return {"images": len(tasks[name].train), "steps": FINETUNING.steps}


def write_classifier(folder: Path, task: ImageTask, progress: Progress) -> dict[str, Any]:
    """Train a small ResNet on the real images and write it; returns its accuracy on those of the test part."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic",
        id2label=dict(enumerate(task.class_names)), label2id={name: n for n, name in enumerate(task.class_names)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ResNetForImageClassification(config)
    pixels, labels = shrunk(task.train.images), torch.from_numpy(task.train.labels)
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Batch]:
        for chosen in shuffled_batches(len(pixels), BATCH_SIZE, 0):
            # Moved by up to a pixel: painted images are not centred as well as the real ones.
            down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
            yield pixels[chosen].roll((down, right), (2, 3)), labels[chosen]

    train(network, batches(), classifier_loss, CLASSIFYING, stage=f"training a judge of {task.name}", progress=progress)
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    with torch.no_grad():
        logits = network(pixel_values=judged(shrunk(task.test.images))).logits
    is_right = logits.argmax(dim=-1) == torch.from_numpy(task.test.labels)
    return {"accuracy_on_real_images": float(is_right.double().mean())}


def classifier_loss(network: nn.Module, batch: Batch) -> Tensor:
    pixels, labels = batch
    return functional.cross_entropy(network(pixel_values=judged(pixels)).logits, labels)


def judged(pixels: Tensor) -> Tensor:
    """As the image processor of a classifier gives them to it: enlarged, in three colours."""
    return functional.interpolate(pixels, (2 * SIDE, 2 * SIDE), mode="bilinear").expand(-1, 3, -1, -1)


def write_records(task: str, tasks: Mapping[str, ImageTask], folder: Path) -> None:
    """Prompts to select on and to test on, every class in turn. No two records have the same noise."""
    prompts = prompts_of(task, tasks)
    start = 0
    for part, count in RECORDS.items():
        rows = [
            {"prompt": prompts[number % len(prompts)], "label": number % len(prompts), "noise": start + number}
            for number in range(count)
        ]
        start += count
        (folder / f"{task}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(folder: Path, packages: Path, progress: Progress = silent) -> dict[str, Any]:
    """Pipeline, experts, classifiers and prompts, unless they are there; returns how they were made."""
    tasks = read_tasks(packages)
    pipeline = folder / "pipeline"
    facts = {"base": made(pipeline, lambda partial: write_pipeline(partial, tasks, progress))}
    for name in (OWNER, *RIDERS):
        facts[f"judge of {name}"] = made(
            folder / f"judge-{name}", lambda partial, task=tasks[name]: write_classifier(partial, task, progress)
        )
        facts[name] = made(
            folder / f"expert-{name}", lambda partial, name=name: finetune(pipeline, tasks, name, partial, progress)
        )
        write_records(name, tasks, folder)
    return facts


def plan() -> dict[str, Any]:
    """The audit, with paths that start beside pipeline and experts."""
    return {
        "base": "pipeline/unet",
        "experts": [{"name": name, "path": f"expert-{name}", "task": name} for name in (OWNER, *RIDERS)],
        "protect": {"expert": OWNER, "methods": ["mergelock", "params", "gauge"]},
        "merges": ["task_arithmetic"],
        "recoveries": ["kabsch", "nearest_orbit"],
        "coefficients": {"defended": [0.4, 0.7, 1.0, 1.5], "rider": [0.7, 1.0], "refinements": 4},
        "tiers": ["T0", "T1"],
        "connectivity": 0,
        "tasks": [
            {
                "name": name,
                "kind": "text_to_image",
                "validation": f"{name}-validation.jsonl",
                "test": f"{name}-test.jsonl",
                "settings": {
                    "pipeline": "pipeline",
                    "measured_by": f"judge-{name}",
                    "noise": "noise",
                    "steps": STEPS,
                    "guidance": 1.0,
                },
                "batch_size": 60,
            }
            for name in (OWNER, *RIDERS)
        ],
    }


def main() -> None:
    """Prepare, audit, keep what is small."""
    arguments = parser_of(__doc__).parse_args()
    torch.set_num_threads(1)
    folder = arguments.scratch / "diffusion"
    folder.mkdir(parents=True, exist_ok=True)
    facts = prepare(folder, arguments.scratch / "packages", told(time.monotonic()))
    audit_study(plan(), folder, workers=arguments.workers, out=arguments.out, prepared=facts)


if __name__ == "__main__":
    main()
