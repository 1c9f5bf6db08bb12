"""Networks that compute something else than their architecture says are not fused."""

import pytest
import torch
from golden_data import relative_error
from small_networks import logits, small_model
from torch import nn

from emanet_triton import fuse


def replaced_activation(model):
    model.backbone.layer1[0].relu = nn.GELU()


def hook(model):
    model.decode_head.conv_seg.register_forward_hook(lambda *_: None)


def pre_hook(model):
    model.backbone.register_forward_pre_hook(lambda *_: None)


def own_forward(model):
    model.decode_head.forward = lambda x: x


def own_padding(model):
    model.backbone.stem[0].padding_mode = "reflect"


def dilation(model):
    model.backbone.layer4[0].conv2.dilation = (2, 1)


def half_in_training(model):
    model.backbone.train()


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.decode_head.conv_seg)


def old_weight_norm(model):
    nn.utils.spectral_norm(model.decode_head.conv_seg).eval()


def another_layer(model):
    model.backbone.layer2.append(nn.Identity())


def no_activation(model):
    model.decode_head.bottleneck.act = None


def other_classes(model):
    model.decode_head.conv_seg = nn.Conv2d(128, 7, 1).eval()


def no_statistics(model):
    bn = model.backbone.layer1[0].bn1
    bn.running_mean = bn.running_var = None


def all_sizes(model):
    conv = model.backbone.stem[0]
    conv.groups, conv.kernel_size, conv.padding, conv.stride = 2, (5, 5), (0, 0), (3, 3)
    conv.out_channels, conv.in_channels = 5, 4


def own_methods(model):
    model.decode_head.forward = model.decode_head.extra_repr = lambda *_: ""
    model.decode_head.get_extra_state = lambda: None


def reloaded(model):
    head = type(model.decode_head)
    model.decode_head.__class__ = type(head.__name__, (head,), {"__module__": head.__module__})


ALTERED = {
    replaced_activation: "backbone.layer1.0.relu is a GELU, expected a ReLU",
    hook: "decode_head.conv_seg has a forward hook",
    pre_hook: "backbone has a forward pre-hook",
    own_forward: "decode_head has a forward of its own",
    own_padding: "backbone.stem.0 has padding_mode 'reflect', expected 'zeros'",
    dilation: "backbone.layer4.0.conv2 has dilation (2, 1), expected (2, 2)",
    half_in_training: "backbone is in training mode",
    parametrized: "decode_head.conv_seg is a ParametrizedConv2d, expected a Conv2d",
    old_weight_norm: "decode_head.conv_seg has a forward pre-hook",
    another_layer: "backbone.layer2 has a module 1, which is none of EMANet's",
    no_activation: "decode_head.bottleneck has no module act",
    other_classes: "decode_head.conv_seg has out_channels 7, expected 5",
    no_statistics: "backbone.layer1.0.bn1 has no running_mean",
    all_sizes: "backbone.stem.0 has in_channels 4, expected 3",
    own_methods: "decode_head has a forward of its own",
    reloaded: "decode_head is of a class that was reloaded since",
}


@pytest.mark.parametrize(("alter", "found"), ALTERED.items(), ids=[f.__name__ for f in ALTERED])
def test_what_it_cannot_represent_is_refused(alter, found):
    model = small_model()
    fuse(model)
    alter(model)
    with pytest.raises(ValueError) as raised:
        fuse(model)
    wanted = f"fuse takes an EMANet that nothing has altered, but here {found}"
    assert str(raised.value) == wanted


def other_eps(model):
    model.backbone.layer1[0].bn1.eps = 0.5


def other_stages(model):
    model.decode_head.ema_module.num_stages = 1


def without_auxiliary_head(model):
    model.auxiliary_head = None


def backward_hook(model):
    model.backbone.register_full_backward_hook(lambda *_: None)


def own_attribute(model):
    model.note, model.decode_head.dropout.p = "mine", 0.5


def extra_buffer(model):  # as mmcv's EMA hook keeps them
    model.register_buffer("ema_weight", torch.zeros(3))


HARMLESS = [
    other_eps, other_stages, without_auxiliary_head, backward_hook, own_attribute, extra_buffer
]  # fmt: skip


@pytest.mark.parametrize("alter", HARMLESS, ids=[f.__name__ for f in HARMLESS])
def test_what_it_can_represent_is_fused(alter):
    images = torch.randn(2, 3, 49, 70, generator=torch.Generator().manual_seed(1))
    model = small_model()
    alter(model)
    assert relative_error(fuse(model)(images), logits(model, images)) <= 1e-5
