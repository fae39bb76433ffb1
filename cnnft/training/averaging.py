"""Averages of weights, and BatchNorm statistics that belong to them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cnnft.machine import distributed


def running_average(network: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and buffers (Polyak and Juditsky, 1992).

    average <- d · average + (1 - d) · network, with d = min(decay, (1 + n) / (10 + n)) after n
    updates, as TensorFlow has it: a short training is not an average of its beginning.
    """

    def blend(averages: Sequence[torch.Tensor], present: Sequence[torch.Tensor], _: object) -> None:
        if not averages[0].is_floating_point():  # counters; tensors come grouped by dtype
            torch._foreach_copy_(list(averages), list(present))
            return
        n = int(average.n_averaged)  # which lies on the CPU: no step waits for a GPU
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, present, n)

    average = AveragedModel(network, multi_avg_fn=blend, use_buffers=True)
    return average


def equal_average(network: nn.Module) -> AveragedModel:
    """Stochastic weight averaging: the mean of all updates (Izmailov et al., 2018)."""
    return AveragedModel(network)


def recalibrate(network: nn.Module, layers: Iterable[nn.Module], batches: Iterable[Tensor]) -> None:
    """Make the running statistics of the BatchNorm `layers` those of `batches` (B, 3, H, W), of
    mixed images.

    Running averages are of weights that are gone, or, where steps are few beside the layers'
    momentum, of another task. Each batch counts by its images; of several processes each has its
    share. Everything else is in eval mode meanwhile.
    """
    device = next(network.parameters()).device
    network.eval()
    norms = [layer for layer in layers if isinstance(layer, _BatchNorm)]
    if not norms:
        return
    synchronised = any(isinstance(layer, nn.SyncBatchNorm) for layer in norms)
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.train()
    seen = 0
    with torch.no_grad():
        for pixels in batches:
            if len(pixels) == 1 and seen and not synchronised:  # one has no variance
                continue
            seen += len(pixels)
            for layer in norms:
                layer.momentum = len(pixels) / seen
            network(pixels.to(device))
    network.eval()
    images = distributed.all_reduce_sum(torch.tensor(float(seen), device=device))
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
        for statistic in (layer.running_mean, layer.running_var):
            assert statistic is not None
            statistic.copy_(distributed.all_reduce_sum(statistic * seen) / images)
