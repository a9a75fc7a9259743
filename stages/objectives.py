"""Losses over the vocabulary, computed a chunk of tokens at a time so that the logits never exist as a whole.

The gradient is written by hand and taken during the forward pass, while a chunk's logits are at hand (the idea of
Liger-Kernel's fused linear cross entropy): the backward pass only scales it. Softmax is fp32 whatever the inputs are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.products import product
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.moe import RoutingRecord
from stages.balance import new_record, router_loss
from stages.config import DistillConfig, MoETrainConfig

IGNORE = -100
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
"""fp32 logits of one chunk. On a CPU they should stay in the last-level cache: 2 to 8 MiB were fastest of 1 to 64 MiB
(vocabularies of 4096 and 32,000, one thread). A GPU wants few, large launches."""


class Teacher(NamedTuple):
    """What a teacher says about the same tokens: logits are `hidden @ weight.T`."""

    hidden: Tensor
    """[..., D]."""
    weight: Tensor
    """[V, D]."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy of the logits `hidden @ weight.T`, in nats, as an fp32 scalar.

    Args:
        hidden: [..., D].
        weight: [V, D].
        labels: int64 [...], -100 where there is no loss.
    """
    return _loss(hidden, weight, labels, None, 0.0, 1.0)


def linear_distillation(
    hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher, *, mix: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """`mix * T^2 * KL(teacher || student) + (1 - mix) * cross entropy`, summed over supervised tokens, fp32 scalar.

    Forward KL of the softened distributions softmax(z / T); T^2 keeps the gradient's size (Hinton et al. 2015,
    arXiv 1503.02531, section 2). No gradient reaches the teacher.
    """
    return _loss(hidden, weight, labels, teacher, mix, temperature)


def head_rows(config: ModelConfig, labels: Tensor) -> Tensor:
    """Token ids as rows of the model's head, -100 where a trimmed head has none (and where there was -100)."""
    if not config.output_tokens:
        return labels
    rows = torch.full((config.vocab_size,), IGNORE, device=labels.device)
    rows[torch.tensor(config.output_tokens, device=labels.device)] = torch.arange(config.head_size, device=labels.device)
    return torch.where(labels >= 0, rows[labels.clamp(min=0)], labels)


def model_token_nll(model: Decoder, tokens: Tensor, positions: Tensor | None, labels: Tensor) -> Tensor:
    """Negative log-likelihood of every label under the model, fp32 [B, T]; infinite where its head cannot say the label."""
    hidden, weight = model.head_operands(model.hidden(tokens, positions))
    rows = head_rows(model.config, labels)
    nll = linear_token_nll(hidden, weight, rows)
    return nll.masked_fill((rows == IGNORE) & (labels != IGNORE), float("inf")) if model.config.output_tokens else nll


def kl_divergence(student: Tensor, teacher: Tensor, supervised: Tensor) -> Tensor:
    """Summed KL(teacher || student) in nats of logits [..., V] where `supervised` [...] is true: the reference."""
    log_student = F.log_softmax(student[supervised].float(), dim=-1)
    log_teacher = F.log_softmax(teacher[supervised].float(), dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum()


def linear_token_nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of every label, fp32 [...], 0 where the label is -100. Without gradient."""
    flat = labels.reshape(-1)
    kept = (flat != IGNORE).nonzero().squeeze(-1)
    result = torch.zeros(flat.shape, dtype=torch.float32, device=labels.device)
    with torch.no_grad():
        rows, targets = hidden.reshape(-1, hidden.shape[-1])[kept], flat[kept]
        for part, chunk, target in zip(*(t.split(_chunk_rows(weight)) for t in (kept, rows, targets)), strict=True):
            result[part] = F.cross_entropy(product(chunk, weight).float(), target, reduction="none")
    return result.view(labels.shape)


def _chunk_rows(weight: Tensor) -> int:
    return max(64, CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cuda"]) // (4 * weight.shape[0]))


def _loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher | None, mix: float, temperature: float
) -> Tensor:
    flat = labels.reshape(-1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    teacher_hidden = None if teacher is None else teacher.hidden.detach().reshape(-1, teacher.hidden.shape[-1])
    if flat.device.type == "cpu" and not bool((flat != IGNORE).all()):
        # Prompts and padding cost nothing. On a GPU the count would have to be waited for; there they are masked.
        kept = (flat != IGNORE).nonzero().squeeze(-1)
        flat, hidden = flat[kept], hidden[kept]
        teacher_hidden = None if teacher_hidden is None else teacher_hidden[kept]
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    teacher_weight = None if teacher is None else teacher.weight.detach()
    return _VocabularyLoss.apply(hidden, weight, flat, teacher_hidden, teacher_weight, mix, temperature)


class _VocabularyLoss(torch.autograd.Function):
    """Chunked loss over [N, D] x [V, D] with its gradient; see `linear_distillation` for the formula."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None, mix: float, temperature: float,
    ) -> Tensor:  # fmt: skip
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(labels), _chunk_rows(weight)):
                part = slice(start, start + _chunk_rows(weight))
                logits = product(hidden[part], weight).float()
                if teacher_hidden is None or teacher_weight is None:
                    loss, grad = _cross_entropy_chunk(logits, labels[part])
                else:
                    teacher_logits = product(teacher_hidden[part], teacher_weight).float()
                    loss, grad = _distillation_chunk(logits, teacher_logits, labels[part], mix, temperature)
                total += loss
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = product(grad, weight.T)
                if grad_weight is not None:
                    if grad.dtype == torch.float32:
                        grad_weight.addmm_(grad.T, hidden[part])
                    else:
                        grad_weight += grad.T @ hidden[part]
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden = None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype)
        weight = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        return hidden, weight, None, None, None, None, None


def _cross_entropy_chunk(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss and d loss / d logits = softmax - onehot. `logits` [n, V] is used up."""
    supervised = labels != IGNORE
    index = labels.clamp(min=0).unsqueeze(-1)
    picked = logits.gather(-1, index).squeeze(-1)
    top = logits.amax(dim=-1, keepdim=True)
    grad = logits.sub_(top).exp_()
    mass = grad.sum(dim=-1, keepdim=True)
    loss = ((mass.log() + top).squeeze(-1) - picked)[supervised].sum()
    grad.mul_(supervised.unsqueeze(-1) / mass)
    grad.scatter_add_(-1, index, -supervised.unsqueeze(-1).to(grad.dtype))
    return loss, grad


def _distillation_chunk(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, mix: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Summed loss and gradient; d T^2 KL / d logits = T * (softmax(z / T) - teacher)."""
    supervised = (labels != IGNORE).unsqueeze(-1)
    log_student = F.log_softmax(logits / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    teacher = log_teacher.exp()
    divergence = (teacher * (log_teacher - log_student)).sum(dim=-1, keepdim=True)
    loss = mix * temperature**2 * (divergence * supervised).sum()
    grad = (log_student.exp() - teacher) * (mix * temperature) * supervised
    if mix != 1.0:
        cross_entropy, its_grad = _cross_entropy_chunk(logits, labels)
        loss, grad = loss + (1.0 - mix) * cross_entropy, grad.add_(its_grad, alpha=1.0 - mix)
    return loss, grad


class TrainableModel(nn.Module):
    """A decoder with its objective: what is sharded, and called once a micro-batch. State names are `model.<name>`."""

    def __init__(self, model: Decoder, distill: DistillConfig | None = None, moe: MoETrainConfig | None = None) -> None:
        super().__init__()
        self.model = model
        self.distill = distill
        self.moe = moe
        self.record: RoutingRecord | None = None
        """What the routers did in the last forward pass that trains."""

    def forward(
        self, tokens: Tensor, positions: Tensor | None, labels: Tensor, teacher: Teacher | None = None,
        reduction: str = "sum",
    ) -> Tensor:  # fmt: skip
        """Summed loss over supervised tokens, or with `reduction="none"` every token's cross entropy [B, T].

        Args:
            tokens, positions, labels: int64 [B, T]; labels are shifted already, -100 where there is no loss. Nor is there
                one where a trimmed head cannot say the label; distillation compares over what it can say.
            teacher: required for the summed loss where the model was built with `distill`.
        """
        if reduction == "none":
            return model_token_nll(self.model, tokens, positions, labels)
        self.record = new_record(self.model, self.moe)
        hidden, weight = self.model.head_operands(self.model.hidden(tokens, positions, record=self.record))
        labels = head_rows(self.model.config, labels)
        loss = self._objective(hidden, weight, labels, teacher)
        if self.record is None:
            return loss
        extra = router_loss(self.record, self.moe, labels != IGNORE)
        return loss + (extra - extra.detach())  # its gradient, without its value: what is reported is the objective

    def _objective(self, hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher | None) -> Tensor:
        if self.distill is None:
            return linear_cross_entropy(hidden, weight, labels)
        if teacher is None:
            raise ValueError("distillation needs what the teacher says about these tokens; got none")
        if (ids := self.model.config.output_tokens) and len(teacher.weight) != len(ids):  # a teacher with its whole head
            teacher = Teacher(teacher.hidden, teacher.weight[torch.tensor(ids, device=labels.device)])
        return linear_distillation(
            hidden, weight, labels, teacher, mix=self.distill.weight, temperature=self.distill.temperature
        )


class TeacherModel(nn.Module):
    """A frozen decoder that says what it thinks. Its logits are made a chunk at a time, inside the student's loss."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: Tensor, positions: Tensor | None) -> Teacher:
        return Teacher(*self.model.head_operands(self.model.hidden(tokens, positions)))
