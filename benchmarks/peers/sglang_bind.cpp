// Makes one function of SGLang's CPU kernels an op of torch: torch.ops.kimi_linear_peers.sglang_chunk.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

std::tuple<at::Tensor, at::Tensor>
chunk_gated_delta_rule_cpu(const at::Tensor &query, const at::Tensor &key, const at::Tensor &value,
                           const at::Tensor &g, const at::Tensor &beta,
                           const at::Tensor &initial_state, bool output_final_state,
                           const at::Tensor &offsets, bool head_first, bool l2_norm, double eps);

static std::tuple<at::Tensor, at::Tensor> chunk(const at::Tensor &q, const at::Tensor &k,
                                                const at::Tensor &v, const at::Tensor &g,
                                                const at::Tensor &beta, const at::Tensor &state,
                                                const at::Tensor &offsets)
{
    return chunk_gated_delta_rule_cpu(q, k, v, g, beta, state, true, offsets, false, false, 1e-6);
}

TORCH_LIBRARY(kimi_linear_peers, m) { m.def("sglang_chunk", &chunk); }
