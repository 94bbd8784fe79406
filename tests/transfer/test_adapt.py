import pytest
import torch

from pcrl_nnunet.transfer.adapt import adapt_input_channels, adapt_kernel_size


@pytest.mark.parametrize(("given", "wanted"), [(1, 4), (4, 1), (2, 3)])
def test_identical_input_channels_give_the_same_response_after_adapting(given: int, wanted: int) -> None:
    weight, image = torch.randn(5, given, 3, 3), torch.randn(2, 1, 8, 8)
    adapted = adapt_input_channels(weight, wanted)
    assert adapted.shape == (5, wanted, 3, 3)
    before = torch.nn.functional.conv2d(image.expand(-1, given, -1, -1), weight)
    after = torch.nn.functional.conv2d(image.expand(-1, wanted, -1, -1), adapted)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_one_channel_is_repeated_and_divided() -> None:
    weight = torch.randn(5, 1, 3, 3, 3)
    torch.testing.assert_close(adapt_input_channels(weight, 4), weight.repeat(1, 4, 1, 1, 1) / 4)


def test_the_first_channels_are_taken_one_for_one_and_further_ones_get_zero() -> None:
    weight = torch.randn(5, 3, 3, 3)
    assert torch.equal(adapt_input_channels(weight, 2, how="first"), weight[:, :2])
    more = adapt_input_channels(weight, 4 + 1, label_channels=1, how="first")
    assert torch.equal(more[:, :3], weight)
    assert not more[:, 3:].any()


@pytest.mark.parametrize("wanted", [1, 4])
def test_every_channel_gets_the_mean(wanted: int) -> None:
    weight = torch.randn(5, 2, 3, 3)
    adapted = adapt_input_channels(weight, wanted, how="mean")
    assert adapted.shape == (5, wanted, 3, 3)
    for channel in range(wanted):
        torch.testing.assert_close(adapted[:, channel], (weight[:, 0] + weight[:, 1]) / 2)


@pytest.mark.parametrize("how", ["repeat", "first", "mean"])
def test_an_equal_number_of_channels_keeps_the_weight(how: str) -> None:
    weight = torch.randn(5, 3, 3, 3)
    assert torch.equal(adapt_input_channels(weight, 3, how=how), weight)


def test_lengthening_a_kernel_keeps_the_convolution_and_is_exactly_reversible() -> None:
    weight, image = torch.randn(5, 2, 1, 3, 3), torch.randn(1, 2, 6, 6, 6)
    longer = adapt_kernel_size(weight, (3, 3, 5))
    assert longer.shape == (5, 2, 3, 3, 5)
    conv = torch.nn.functional.conv3d
    torch.testing.assert_close(conv(image, longer, padding="same"), conv(image, weight, padding="same"))
    assert torch.equal(adapt_kernel_size(longer, (1, 3, 3)), weight)


@pytest.mark.parametrize(("given", "wanted"), [(3, 1), (5, 3), (7, 1), (4, 2)])
def test_shortening_a_kernel_keeps_the_response_to_images_constant_along_it(given: int, wanted: int) -> None:
    weight, image = torch.randn(5, 2, given, 3, 3), torch.randn(1, 2, 1, 6, 6).expand(-1, -1, 12, -1, -1)
    shorter = adapt_kernel_size(weight, (wanted, 3, 3))
    assert shorter.shape == (5, 2, wanted, 3, 3)
    conv = torch.nn.functional.conv3d
    before, after = conv(image, weight), conv(image, shorter)  # not padded: no border
    torch.testing.assert_close(after[:, :, :1], before[:, :, :1], rtol=1e-4, atol=1e-5)


def test_an_even_kernel_is_not_adapted_to_an_odd_one() -> None:
    weight = torch.randn(5, 2, 2, 3, 3)
    assert torch.equal(adapt_kernel_size(weight, (3, 3, 3)), weight)
