"""Host pools as SGLang's are in the published wheel, made of torch tensors. The real ones need its kernels."""

from __future__ import annotations

import torch


class MhaPool:
    """Keys and values of `layers` layers; see MHATokenToKVPoolHost."""

    def __init__(self, layout="page_first", dtype=torch.bfloat16, page_size=4, pages=16, layers=2, heads=2, dim=8):
        self.layout, self.dtype, self.page_size, self.page_num = layout, dtype, page_size, pages
        self.layer_num, self.head_num, self.head_dim = layers, heads, dim
        self.size = pages * page_size
        shape = {
            "layer_first": (2, layers, self.size, heads, dim),
            "page_first": (2, self.size, layers, heads, dim),
            "page_first_direct": (2, pages, layers, page_size, heads, dim),
            "page_head": (2, pages, heads, page_size, layers, dim),
        }[layout]
        self.kv_buffer = torch.zeros(shape, dtype=dtype)

    def _page(self, index):
        if self.layout == "layer_first":
            return self.kv_buffer[:, :, index : index + self.page_size]
        if self.layout == "page_first":
            return self.kv_buffer[:, index : index + self.page_size]
        number = index // self.page_size
        return self.kv_buffer[:, number : number + 1]

    def get_data_page(self, index, flat=True):
        page = self._page(index)
        return page.flatten() if flat else page

    def get_dummy_flat_data_page(self):
        return torch.zeros(self._page(0).shape, dtype=self.dtype).flatten()

    def set_from_flat_data_page(self, index, data_page):
        page = self._page(index)
        page.copy_(data_page.reshape(page.shape))

    def get_page_buffer_meta(self, indices):
        assert len(indices) % self.page_size == 0
        token = self.head_num * self.head_dim * self.dtype.itemsize
        values = self.layer_num * self.size * token
        places = []
        for index in indices.tolist()[:: self.page_size]:
            if self.layout == "layer_first":
                for layer in range(self.layer_num):
                    key = self.kv_buffer.data_ptr() + (index + layer * self.size) * token
                    places += [key, key + values]
            else:
                key = self.kv_buffer.data_ptr() + index * self.layer_num * token
                places += [key, key + values]
        size = token * self.page_size * (1 if self.layout == "layer_first" else self.layer_num)
        return places, [size] * len(places)


class MlaPool(MhaPool):
    """Latents: one row a token and layer; see MLATokenToKVPoolHost."""

    def __init__(self, layout="page_first", dtype=torch.bfloat16, page_size=4, pages=16, layers=2, width=24):
        self.layout, self.dtype, self.page_size, self.page_num = layout, dtype, page_size, pages
        self.layer_num, self.kv_cache_dim = layers, width
        self.size = pages * page_size
        shape = {"layer_first": (layers, self.size, 1, width), "page_first": (self.size, layers, 1, width)}[layout]
        self.kv_buffer = torch.zeros(shape, dtype=dtype)

    def _page(self, index):
        tokens = slice(index, index + self.page_size)
        return self.kv_buffer[:, tokens] if self.layout == "layer_first" else self.kv_buffer[tokens]

    def get_page_buffer_meta(self, indices):
        token = self.kv_cache_dim * self.dtype.itemsize
        starts = indices.tolist()[:: self.page_size]
        base = self.kv_buffer.data_ptr()
        if self.layout == "layer_first":
            places = [base + (start + layer * self.size) * token for start in starts for layer in range(self.layer_num)]
            return places, [token * self.page_size] * len(places)
        return [base + start * self.layer_num * token for start in starts], token * self.page_size * self.layer_num
