"""``train``: from annotated images to weights; returns and emits, prints nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from tilepipe.errors import TrainError
from tilepipe.infer.plans import usual_halo
from tilepipe.models import Net, build, locality_of, save_checkpoint
from tilepipe.train.ahead import Batch, batches, threads_for
from tilepipe.train.budget import Budget
from tilepipe.train.curve import draw_curve
from tilepipe.train.dataset import Samples, Teaching
from tilepipe.train.events import Event, Started, Stepped, TrainResult, Validated
from tilepipe.train.images import data_hash, open_raster
from tilepipe.train.log import TrainLog
from tilepipe.train.losses import gate_loss, make_loss, supervised
from tilepipe.train.pixels import check_pair
from tilepipe.train.predict import autocast, choose_precision
from tilepipe.train.refusals import told
from tilepipe.train.schedule import make_optimizer, rate
from tilepipe.train.setup import (
    check_nothing_there,
    check_outputs,
    choose_arguments,
    choose_classes,
    choose_device,
    choose_normalisation,
    curve_path,
    fingerprint_of,
    gather,
    log_path,
    state_path,
)
from tilepipe.train.spec import TrainSpec
from tilepipe.train.state import Averaged, Counters, load_state, save_state
from tilepipe.train.validate import KindScore, overall, score_images, scores_json


def train(
    spec: TrainSpec,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> TrainResult:
    """Train, and write the best weights by validation, a CSV log and a curve beside them.

    ``overwrite``: a new training takes the place of what lies there, its weights from the first
    validation on. Raises TrainError for settings and data that do not fit, and where something
    lies there and neither ``resume`` nor ``overwrite`` is asked for.
    """
    training = Training(spec, resume=resume, overwrite=overwrite, on_event=on_event or _ignore)
    return training.run()


def _ignore(event: Event) -> None:
    del event


class Training:
    """One training: the parts, and the steps."""

    def __init__(
        self,
        spec: TrainSpec,
        *,
        resume: bool,
        overwrite: bool,
        on_event: Callable[[Event], None],
    ) -> None:
        self.spec, self.on_event = spec, on_event
        self.device = choose_device(spec.device)
        self.precision = choose_precision(spec.precision, self.device)
        self.arguments = choose_arguments(spec)
        training, self.validation = gather(spec)
        if not training:
            raise TrainError(f"{spec.images}: no image is left to learn from")
        check_outputs(spec, (*training, *self.validation))
        if not resume and not overwrite:
            check_nothing_there(spec)
        self.classes = choose_classes(spec)
        channels = spec.in_channels or open_raster(training[0].image).channels
        n_classes = len(self.classes) if spec.target == "classes" else None
        check = partial(check_pair, channels=channels, n_classes=n_classes)
        have = {check(pair) for pair in (*training, *self.validation)}
        self.luminance = channels == 1 and have != {1}
        self.outputs = 1 if spec.classes == 1 else len(self.classes)
        self.normalisation = choose_normalisation(spec, channels)
        torch.manual_seed(spec.seed)
        self.net: Net = build(
            spec.model, in_channels=channels, classes=self.outputs, **self.arguments
        )
        self.net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.locality = locality_of(spec.model, self.arguments)
        self.teaching = Teaching(
            target=spec.target,
            n_classes=len(self.classes),
            ring_px=spec.ring_px,
            weighted="weighted-ce" in spec.loss.split("+"),
            class_weights=spec.class_weights,
            w0=spec.w0,
            sigma=spec.sigma,
        )
        # In the weight map w_c is already counted.
        self.loss = make_loss(
            spec.loss, class_weights=None if self.teaching.weighted else spec.class_weights
        )
        input_px = self.net.next_legal(spec.output_px + 2 * self.net.margin_px)
        self.samples = Samples(
            training,
            teaching=self.teaching,
            channels=channels,
            input_px=input_px,
            output_px=input_px - 2 * self.net.margin_px,
            augment=spec.augment,
            kind_weights=spec.kind_weights,
            seed=spec.seed,
        )
        self.budget = Budget.of(spec, n_images=len(training))
        self.averaged = Averaged(self.net, spec.ema)
        self.optimizer = make_optimizer(spec, self.net)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.data_hash = data_hash((*training, *self.validation))
        self.counters = Counters()
        self.state_path = state_path(spec)
        self.log = TrainLog(log_path(spec))
        self.fingerprint = fingerprint_of(
            spec, self.data_hash, training=training, validation=self.validation
        )
        if resume:
            self._resume()
        else:
            self.state_path.unlink(missing_ok=True)  # of another: --resume would take it up
        spec.out.parent.mkdir(parents=True, exist_ok=True)
        self.log.start(self.counters.step)
        self.on_event(
            Started(
                training=len(training),
                validation=len(self.validation),
                device=str(self.device),
                precision=self.precision,
                parameters=sum(part.numel() for part in self.net.parameters()),
                resumed_step=self.counters.step,
            )
        )

    def _resume(self) -> None:
        if not self.state_path.is_file():
            if self.spec.out.is_file():
                raise TrainError(
                    f"{self.spec.out}: no state beside it to resume: that training is finished, or "
                    "the one in its place was stopped before it saved any; --overwrite begins anew"
                )
            check_nothing_there(self.spec)
            return
        self.counters = load_state(
            self.state_path,
            module=self.net,
            averaged=self.averaged,
            optimizer=self.optimizer,
            scaler=self.scaler,
            fingerprint=self.fingerprint,
        )

    @property
    def _has_kept(self) -> bool:
        """Whether the weights that lie there are this training's, not those of one before."""
        return bool(self.counters.sha256) and self.spec.out.is_file()

    def progress(self, elapsed_s: float) -> float:
        """Share of the budget used."""
        return self.budget.used(self.counters.step, elapsed_s)

    def run(self) -> TrainResult:
        """Step until the budget is used; validate on the way and at the end."""
        counters = self.counters
        drawn = batches(
            self.samples,
            first=counters.step,
            size=self.spec.batch,
            device=self.device,
            threads=threads_for(self.device),
        )
        with closing(drawn):
            self._learn(drawn, started_s=time.monotonic() - counters.elapsed_s)
        # The time may be up between a step and the next look at the clock: what was learnt since
        # the last validation may be the best.
        if counters.loss_count or not self._has_kept:
            self.validate(rate(self.spec, 1.0))
        self.state_path.unlink(missing_ok=True)
        return TrainResult(
            weights=self.spec.out,
            sha256=counters.sha256,
            steps=counters.step,
            elapsed_s=counters.elapsed_s,
            metric=counters.best,
            best_step=counters.best_step,
            scores=counters.scores,
        )

    def _learn(self, drawn: Iterator[Batch], *, started_s: float) -> None:
        counters = self.counters
        saved_s = time.monotonic()
        next_validation = self.budget.next_validation(self.progress(counters.elapsed_s))
        while (progress := self.progress(time.monotonic() - started_s)) < 1.0:
            began_s = time.monotonic()
            lr = rate(self.spec, progress)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            with told(self.spec.batch, self.samples.input_px):
                loss = self.step(next(drawn), freeze=progress >= self.spec.freeze_norm)
            counters.step += 1
            counters.loss_sum += loss
            counters.loss_count += 1
            self.averaged.update(self.net, counters.step)
            now_s = time.monotonic()
            counters.elapsed_s = now_s - started_s
            progress = self.progress(counters.elapsed_s)
            rate_per_s = self.spec.batch / max(1e-9, now_s - began_s)
            self.on_event(Stepped(counters.step, progress, loss, lr, rate_per_s))
            due = (
                counters.step % self.spec.validate_every == 0
                if self.spec.validate_every
                else progress >= next_validation
            )
            if due or progress >= 1.0:
                began_s = time.monotonic()
                self.validate(lr)
                next_validation = self.budget.next_validation(progress, time.monotonic() - began_s)
                saved_s = -float("inf")
            if time.monotonic() - saved_s >= self.spec.save_every_s:
                counters.elapsed_s = time.monotonic() - started_s
                self.save()
                saved_s = time.monotonic()

    def step(self, batch: Batch, *, freeze: bool = False) -> float:
        """Learn from one batch; return its loss. ``freeze``: norms use running statistics."""
        self.net.train()
        if freeze:
            for part in self.net.modules():
                if isinstance(part, torch.nn.BatchNorm2d):
                    part.eval()
        # Dropout draws from the global generator: seeded per step, a resumed run draws the same.
        torch.manual_seed(self.spec.seed * 1_000_003 + self.counters.step)
        with autocast(self.device, self.precision):
            images = self.normalisation(batch.images)
            output = self.net(images.contiguous(memory_format=torch.channels_last))
        loss = supervised(
            [logits.float() for logits in output["logits"]],
            batch.targets,
            batch.weights,
            loss=self.loss,
            output_weights=self.spec.output_weights,
        )
        if "cls" in output and self.spec.gate_weight > 0:
            loss = loss + self.spec.gate_weight * gate_loss(output["cls"].float(), batch.targets)
        value = float(loss.detach())
        if not torch.isfinite(loss):
            raise TrainError(
                f"step {self.counters.step}: the loss is {value}; try a lower --lr, --clip 1 or "
                "--precision fp32"
            )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.scaler.scale(loss))
        if self.spec.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.spec.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value

    def validate(self, lr: float) -> None:
        """Try the averaged weights; keep them if they are the best so far; write log and curve."""
        counters = self.counters
        module = self.averaged.module

        def forward(x: Tensor) -> Tensor:
            logits: Tensor = module.infer(self.normalisation(x))  # type: ignore[operator]
            return logits

        scores = score_images(
            forward,
            self.validation,
            sizes=self.net,
            halo_px=usual_halo(self.locality),
            teaching=self.teaching,
            channels=self.samples.channels,
            device=self.device,
            precision=self.precision,
        )
        loss = counters.loss_sum / max(1, counters.loss_count)
        # Without validation images the last weights are as good as any.
        metric = overall(scores)
        best = not scores or metric > counters.best or not self._has_kept
        if best:
            counters.best_step = counters.step
            counters.best = metric if scores else counters.best
            counters.sha256 = self.keep(scores, metric)
            counters.scores = scores
        counters.loss_sum, counters.loss_count = 0.0, 0
        self.log.add(counters.step, counters.elapsed_s, lr, loss, metric, scores)
        draw_curve(self.log.rows, curve_path(self.spec))
        self.on_event(Validated(counters.step, metric, best, scores))

    def keep(self, scores: Sequence[KindScore], metric: float) -> str:
        """Write the averaged weights with everything that says where they come from."""
        spec = self.spec
        module = self.averaged.module
        if not isinstance(module, Net):
            raise TrainError("the network is not one of tilepipe's")
        return save_checkpoint(
            spec.out,
            module,
            name=spec.model,
            arguments=self.arguments,
            classes=self.classes,
            normalisation=self.normalisation,
            mpp=spec.mpp,
            locality=self.locality,
            extra={
                "step": self.counters.step,
                "metric": metric if scores else None,
                "scores": scores_json(scores),
                "images": {"training": len(self.samples.pairs), "validation": len(self.validation)},
                "data_sha256": self.data_hash,
                "settings": spec.to_json(),
                "luminance": self.luminance,
            },
            storage=spec.store,
        )

    def save(self) -> None:
        """Write the state that ``--resume`` goes on from."""
        save_state(
            self.state_path,
            module=self.net,
            averaged=self.averaged,
            optimizer=self.optimizer,
            scaler=self.scaler,
            counters=self.counters,
            fingerprint=self.fingerprint,
        )
