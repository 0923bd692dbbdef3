"""Train the model after the last cut.

Training fits low-rank adapters to the calibration text, or distils the unpruned model.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn

from secateur.catalog.spec import TrainingSettings
from secateur.contract.errors import ErrorCode, PruningError
from secateur.engine.model.decoder import Decoder

SEGMENT_STEPS = 20
WARM_UP = 0.05
LORA_ALPHA = 16
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Segment:
    """The content of the checkpoint after a stretch of training.

    ``step`` of ``steps`` optimizer steps are done; ``losses`` has the mean token loss (nats) of each step that is done.
    ``tensors`` are the trained parameters and AdamW's moments, float32 on the CPU: ``parameter.NAME``,
    ``exp_avg.NAME``, ``exp_avg_sq.NAME``.
    """

    step: int
    steps: int
    losses: list[float]
    tensors: dict[str, Tensor]


def train(
    decoder: Decoder,
    teacher: Callable[[Tensor], Tensor] | None,
    tokens: Tensor,
    batch_windows: int,
    settings: TrainingSettings,
    seed: int,
    progress: Callable[[float], None],
    resume: Segment | None,
) -> Iterator[Segment]:
    """Train ``decoder``'s frozen model in place on ``tokens`` ``[windows, length]``, and yield Segments on the way.

    ``lora`` trains adapters on every projection of every layer with the next-token loss and merges them at the end (Hu
    et al., LoRA, equation 3); alpha is 16, as in LLM-Pruner and SlimLLM. ``distill`` trains every parameter of the
    decoder layers with T²·KL(teacher ‖ student) of each token's softmax at temperature T (Hinton et al., Distilling the
    Knowledge in a Neural Network, section 2); ``teacher`` maps ``[windows, length]`` to logits
    ``[windows, length, vocabulary]``. Embeddings, the final norm and the output head do not change.

    Beside activations and, for ``distill``, the teacher, memory holds the weights, and for each trained parameter a
    gradient in the model's dtype, the float32 sum of gradients, two float32 moments and, in half precision, a float32
    master copy. With weights, ``distill`` needs 20 bytes for each parameter of the layers, in any dtype, and 12 bytes
    on the CPU for a Segment; adapters need almost no memory.

    A step takes ``settings.batch_size`` windows, or all windows if there are fewer, ``batch_windows`` at a time. The
    choice of windows depends on ``seed`` and the step alone, and no dropout is applied. Training that starts at
    ``resume``, given the model as it was before training, therefore ends with the same weights, bit for bit where the
    device's kernels are deterministic. When the iterator is exhausted, the model has plain weights in its own dtype and
    is frozen; if the iterator is abandoned before, the model cannot be used.

    Raises:
        PruningError: ``loss_not_finite`` when the loss becomes NaN or infinite.
    """
    model, batch = decoder.model, min(settings.batch_size, len(tokens))
    steps = max(1, round(settings.epochs * len(tokens) / batch))
    if settings.kind == "lora":
        adapters = _add_adapters(decoder, settings.rank, seed)
    else:
        for layer in decoder.layers:
            layer.module.requires_grad_(True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # In float32 a master shares its parameter's memory; in half precision the rounding of weights would lose a step.
    masters = {
        name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        for name, parameter in trained.items()
    }
    # No weight decay: it would pull weights towards zero, and zero is no better than what pruning left.
    optimizer = torch.optim.AdamW(masters.values(), weight_decay=0)
    if resume is not None:
        _restore(masters, optimizer, resume)
        _publish(masters, trained)

    def losses_of(windows: Tensor) -> Tensor:
        logits = model(windows, use_cache=False).logits
        if settings.kind == "lora":
            return decoder.losses(logits, windows)
        assert teacher is not None
        with torch.no_grad():
            wanted = teacher(windows)
        return _divergences(wanted, logits, settings.temperature)

    step, losses = (resume.step, list(resume.losses)) if resume is not None else (0, [])
    while step < steps:
        windows = tokens[_order(len(tokens), batch, step, seed)].to(decoder.device)
        losses.append(_accumulate(losses_of, windows.split(batch_windows), masters, trained))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        _publish(masters, trained)
        step += 1
        progress(step / steps)
        if step % SEGMENT_STEPS == 0 or step == steps:
            yield Segment(step, steps, list(losses), _tensors(masters, optimizer))
    if settings.kind == "lora":
        adapters.merge_and_unload()
    model.requires_grad_(False)


def _add_adapters(decoder: Decoder, rank: int, seed: int) -> LoraModel:
    family = decoder.shape.family
    names = [
        f"{family.layers}.{index}.{name}" for index, layer in enumerate(decoder.layers) for name in layer.projections
    ]
    config = LoraConfig(r=rank, lora_alpha=LORA_ALPHA, lora_dropout=0, target_modules=names)
    with torch.random.fork_rng(devices=[]):  # adapters are drawn on the CPU
        torch.manual_seed(seed)
        return LoraModel(decoder.model, config, "default")


def _order(windows: int, batch: int, step: int, seed: int) -> Tensor:
    """Return the indices ``[batch]`` of a step's windows.

    The steps pass over all windows again and again, and every pass has its own order.
    """
    epoch, start = divmod(step * batch, windows)
    passes = [torch.randperm(windows, generator=torch.Generator().manual_seed(seed + n)) for n in (epoch, epoch + 1)]
    return torch.cat(passes)[start : start + batch]


def _rate(step: int, steps: int) -> float:
    """Return the learning rate of a step, as a share of its peak.

    The share rises linearly, then falls linearly, and reaches zero after the last step.
    """
    warm_up = math.ceil(WARM_UP * steps)
    return min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))


def _divergences(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Return T²·KL(teacher ‖ student) ``[windows, length]`` in nats, for logits ``[windows, length, vocabulary]``."""
    precise = torch.promote_types(student.dtype, torch.float32)
    wanted, found = (nn.functional.log_softmax(logits.to(precise) / temperature, -1) for logits in (teacher, student))
    return nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1) * temperature**2


def _accumulate(
    losses_of: Callable[[Tensor], Tensor],
    parts: tuple[Tensor, ...],
    masters: dict[str, Tensor],
    trained: dict[str, nn.Parameter],
) -> float:
    """Return the mean token loss over all ``parts`` together, and add its gradient to ``masters``.

    Backward passes take the summed loss, whose gradients by token are of order one, so that they survive float16.
    """
    total, count = 0.0, 0
    for windows in parts:
        losses = losses_of(windows)
        total, count = total + float(losses.detach().sum(dtype=torch.float64)), count + losses.numel()
        if not math.isfinite(total):
            raise PruningError(
                ErrorCode.LOSS_NOT_FINITE,
                "The loss became NaN or infinite while training; lower 'settings.learning_rate'.",
                field="recovery.training.learning_rate",
            )
        losses.sum().backward()
        for name, parameter in trained.items():
            assert parameter.grad is not None
            gradient, master = parameter.grad.to(masters[name].dtype), masters[name]
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None
    for master in masters.values():
        assert master.grad is not None
        master.grad.div_(count)
    return total / count


@torch.no_grad()
def _publish(masters: dict[str, Tensor], trained: dict[str, nn.Parameter]) -> None:
    """Copy the master copies into the model's parameters."""
    for name, parameter in trained.items():
        parameter.copy_(masters[name])


def _tensors(masters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors that a :class:`Segment` holds, copied to the CPU."""
    tensors = {f"parameter.{name}": master for name, master in masters.items()}
    for moment in MOMENTS:
        tensors |= {f"{moment}.{name}": optimizer.state[master][moment] for name, master in masters.items()}
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def _restore(masters: dict[str, Tensor], optimizer: torch.optim.Optimizer, segment: Segment) -> None:
    for name, master in masters.items():
        master.copy_(segment.tensors[f"parameter.{name}"])
        optimizer.state[master] = {
            "step": torch.tensor(float(segment.step)),
            # Copies, because the optimizer writes in place and the segment belongs to the caller.
            **{moment: segment.tensors[f"{moment}.{name}"].to(master.device, copy=True) for moment in MOMENTS},
        }
