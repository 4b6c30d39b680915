import itertools

import torch

from sliderquant_kernels.tiles import choose_dequantize_tile, choose_tile


def test_every_tile_is_launchable():
    tokens, groups = (1, 16, 17, 32, 33, 64, 4096), (32, 64, 128, None)
    for m, group_size, dtype in itertools.product(tokens, groups, (torch.float16, torch.bfloat16, torch.float32)):
        tile = choose_tile(m, 4096, 4096, 4, group_size, dtype)
        for size in (tile.block_n, tile.block_k, tile.block_m):
            assert size >= 16
            assert size & (size - 1) == 0
        # One step along K must lie within one group, and hold whole bytes of every bit plane.
        assert group_size is None or group_size % tile.block_k == 0
        assert tile.block_k % 8 == 0
        step = choose_dequantize_tile(4096, group_size).block_k
        assert group_size is None or group_size % step == 0
