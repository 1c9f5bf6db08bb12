"""``FusedEMANet`` against mmsegmentation's own segmentor: logits and labels."""

import copy
import pickle

import numpy as np
import pytest
import torch
import versions_of_mmseg as mm
from golden_data import relative_error
from mmseg.models import EncoderDecoder
from versions_of_mmseg import VERSION_1, config_of, metas_of, pair_of

import emanet_triton.mmseg  # noqa: F401  # registers the classes
from emanet_triton.models.network import FusedNetwork

LABELS_ONLY = {"labels_only": True} if VERSION_1 else {}
SIZE = (70, 100)


def inputs_of(batch=1, size=SIZE, seed=0):
    return mm.images_of(batch, size, seed)


@pytest.fixture(scope="module", params=["r50-512x1024", "r50-769x769"], ids=["whole", "slide"])
def pair(request):
    return pair_of(config_of(request.param, **LABELS_ONLY))


def test_logits(pair):
    reference, fused = pair
    inputs = inputs_of(2)
    assert relative_error(mm.encoded(fused, inputs), mm.encoded(reference, inputs)) < 1e-4
    assert isinstance(fused.fused_network(), FusedNetwork)


def test_logits_of_the_real_r50():
    config = mm.Config.fromfile(str(mm.PUBLISHED["r50-512x1024"]))
    config.model.pretrained = None
    reference, fused = pair_of(config)  # of SyncBN
    inputs = inputs_of(1, (128, 256))
    assert relative_error(mm.encoded(fused, inputs), mm.encoded(reference, inputs)) < 1e-4


@pytest.mark.parametrize("flip", ["", "horizontal", "vertical"])
@pytest.mark.parametrize("pad", [(0, 0), (6, 9)], ids=["plain", "padded"])
@pytest.mark.parametrize("image", [(45, 61), (90, 130)], ids=["smaller", "larger"])
def test_labels(pair, image, pad, flip):
    reference, fused = pair
    inputs, metas = [inputs_of(2)], [metas_of(2, SIZE, image, flip, pad)]
    want, probabilities = mm.recorded(
        reference, lambda: mm.tested(reference, inputs, copy.deepcopy(metas))
    )
    mm.assert_labels(mm.tested(fused, inputs, metas), want, probabilities)


@pytest.mark.skipif(VERSION_1, reason="1.x has another class for this")
def test_labels_of_several_views(pair):
    reference, fused = pair
    sizes = [(35, 50), (70, 100), (88, 125)]
    flips = ["", "horizontal"]
    inputs = [inputs_of(1, size, seed) for seed, size in enumerate(sizes) for _ in flips]
    metas = [metas_of(1, size, (80, 110), flip) for size in sizes for flip in flips]
    want, probabilities = mm.recorded(reference, lambda: mm.tested(reference, inputs, metas))
    mm.assert_labels(mm.tested(fused, inputs, metas), want, probabilities)


@pytest.mark.skipif(VERSION_1, reason="1.x always resizes to the image")
def test_labels_of_the_input_size(pair):
    reference, fused = pair
    metas = metas_of(1, SIZE, (80, 110), pad=(6, 9))
    with torch.no_grad():
        want = reference.simple_test(inputs_of(), metas, rescale=False)
        got = fused.simple_test(inputs_of(), metas, rescale=False)
        probabilities = reference.inference(inputs_of(), metas, False)
    mm.assert_labels(got, want, probabilities)


@pytest.mark.skipif(not VERSION_1, reason="0.x has no logits in its results")
def test_results_with_logits():
    reference, fused = pair_of(config_of())
    samples = [[mm.SegDataSample(metainfo=metas_of(1, SIZE, (80, 110))[0])] for _ in range(2)]
    with torch.no_grad():
        (want,), (got,) = map(
            lambda model, given: model(inputs_of(), given, mode="predict"),
            (reference, fused),
            samples,
        )
    assert relative_error(got.seg_logits.data, want.seg_logits.data) < 1e-4
    mm.assert_labels(
        got.pred_sem_seg.data, want.pred_sem_seg.data, want.seg_logits.data.softmax(0)[None]
    )


@pytest.mark.skipif(not VERSION_1, reason="0.x has labels only")
def test_labels_only_leaves_the_logits_out(pair):
    sample = mm.SegDataSample(metainfo=metas_of(1, SIZE, (80, 110))[0])
    (got,) = pair[1](inputs_of(), [sample], mode="predict")
    assert "pred_sem_seg" in got and "seg_logits" not in got
    (got,) = pair[1](inputs_of(), mode="predict")  # mmsegmentation's, without samples
    assert got.seg_logits.data.shape[1:] == SIZE
    sample.set_metainfo({"padding_size": [3, 0, 0, 0]})  # mmsegmentation never pads on the left
    (got,) = pair[1](inputs_of(), [sample], mode="predict")
    assert "seg_logits" in got


@pytest.fixture
def changing():
    return pair_of(config_of())


def assert_follows(reference, fused):
    inputs = inputs_of()
    assert relative_error(mm.encoded(fused, inputs), mm.encoded(reference, inputs)) < 1e-4


def test_replaced_weights_make_the_network_anew(changing):
    _, model = changing
    layer = model.decode_head.conv_seg
    for _ in range(10):  # the new tensor often gets the memory of the old one
        bias = layer.bias.detach() + 1
        layer.bias = None
        layer.bias = torch.nn.Parameter(bias)
        assert torch.equal(model.fused_network().decode_head.conv_seg.bias, bias)


def test_a_layer_in_training_mode_is_not_fused(changing):
    _, model = changing
    model.decode_head.train()
    assert not model.runs_fused()
    model.eval()
    assert model.runs_fused()


def test_changed_weights_make_the_network_anew(changing):
    reference, fused = changing
    first = fused.fused_network()
    assert fused.fused_network() is first
    for model in changing:
        with torch.no_grad():
            model.backbone.layer2[0].conv1.weight.mul_(1.5)
    assert_follows(*changing)
    for model in changing:
        model.decode_head.ema_module.bases = torch.roll(model.decode_head.ema_module.bases, 1, 1)
    assert_follows(*changing)
    mm.enliven(reference, seed=1)
    fused.load_state_dict(reference.state_dict())
    assert_follows(*changing)
    # Nothing can notice a change through .data, but evaluations begin with eval().
    for model in changing:
        model.decode_head.conv_seg.weight.data.copy_(model.decode_head.conv_seg.weight.data * 2)
        model.eval()
    assert_follows(*changing)


def test_a_copy_has_a_network_of_its_own(changing):
    reference, fused = changing
    kept = fused.fused_network()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert other.fused_network() is not kept
        assert_follows(reference, other)
    assert fused.fused_network() is kept
    assert fused.state_dict().keys() == reference.state_dict().keys()


def test_norms_with_another_eps(changing):
    for model in changing:
        model.backbone.layer3[0].bn1.eps = 0.5
    assert_follows(*changing)


def test_training_mode_and_hooks_run_the_own_network(changing):
    reference, fused = changing
    seen = []
    hook = fused.backbone.layer1.register_forward_hook(lambda *_: seen.append(1))
    assert_follows(reference, fused)
    hook.remove()
    assert_follows(reference, fused)
    assert len(seen) == 1
    inputs = inputs_of()
    size = tuple(inputs.shape[2:])
    fused.train().encode_decode(inputs, metas_of(1, size, size)).sum().backward()
    assert fused.backbone.layer1[0].conv1.weight.grad is not None


def test_precision():
    reference, fused = pair_of(config_of(precision="bf16"))
    assert fused.fused_network().dtype == torch.bfloat16
    got = mm.encoded(fused, inputs_of())
    assert got.dtype == torch.float32
    assert 1e-4 < relative_error(got, mm.encoded(reference, inputs_of())) < 0.1
    _, plain = pair_of(config_of())
    with torch.autocast("cpu", torch.bfloat16):
        assert plain.fused_network().dtype == torch.bfloat16
    assert plain.fused_network().dtype == torch.float32


def test_logits_that_are_not_finite(changing):
    _, fused = changing
    if VERSION_1:
        fused.labels_only = True
    torch.nn.init.constant_(fused.decode_head.conv_seg.weight, 3e38)
    with pytest.raises(ValueError, match="the logits of the network are not finite"):
        mm.tested(fused, [inputs_of()], [metas_of(1, SIZE, SIZE)])


def test_it_is_an_encoder_decoder(changing):
    assert isinstance(changing[1], EncoderDecoder)
    assert np.isfinite(mm.encoded(changing[1], inputs_of()).numpy()).all()
