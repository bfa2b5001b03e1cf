"""Engine parameters for two GPU and model pairs, and one of round figures.

No GPU was measured for these. They are derived from published specifications: the GPU's memory, bandwidth and dense
bf16 rate from NVIDIA's data sheets, the model's shape from its published config.json, one GPU, bf16 weights and KV.

    step       weights read once at 80 % of the bandwidth, plus 1 ms for the scheduler, launch and sampling
    prefill    2 FLOP per weight and token at 60 % of the dense rate; a decoding request costs the same, since once
               batched it is one more row in the same matrices
    pair       4 FLOP per layer and hidden unit for each (token, earlier token) pair, at 40 % of the dense rate
    KV token   2 (K and V) * layers * KV heads * head size * 2 bytes, at 80 % of the bandwidth
    KV blocks  90 % of the memory, less weights and 4 GB of activations, in blocks of 16 tokens

What they can be held against: NVIDIA publishes for Llama 3.1 8B Instruct (NIM 1.8.0, "Performance" page of
docs.nvidia.com/nim/benchmarking/llm) 4.6 ms between tokens for one client and 16.1 ms for 250; the first preset gives
7.0 and, with 300 tokens of context each, 17.4 ms. NVIDIA's engine may have read weights of half the size.
"""

from dataclasses import dataclass

from bench.engine import EngineParams

_BYTES = 2  # of a weight and of a KV value, in bf16


@dataclass(frozen=True, slots=True)
class Gpu:
    memory_bytes: float
    bytes_per_second: float
    flop_per_second: float  # bf16, dense


@dataclass(frozen=True, slots=True)
class Model:
    parameters: float
    layers: int
    hidden: int
    kv_heads: int
    head_size: int


H100_SXM = Gpu(80e9, 3.35e12, 989e12)
A100_SXM_80 = Gpu(80e9, 2.039e12, 312e12)
LLAMA_3_1_8B = Model(8.03e9, layers=32, hidden=4096, kv_heads=8, head_size=128)
QWEN_2_5_14B = Model(14.77e9, layers=48, hidden=5120, kv_heads=8, head_size=128)


def derive(gpu: Gpu, model: Model, *, max_num_seqs: int, max_num_batched_tokens: int) -> EngineParams:
    weights = model.parameters * _BYTES
    kv_token = 2 * model.layers * model.kv_heads * model.head_size * _BYTES
    bandwidth = 0.8 * gpu.bytes_per_second
    row = 2 * model.parameters / (0.6 * gpu.flop_per_second)
    return EngineParams(
        step_seconds=weights / bandwidth + 0.001,
        prefill_token_seconds=row,
        prefill_pair_seconds=4 * model.layers * model.hidden / (0.4 * gpu.flop_per_second),
        decode_request_seconds=row,
        kv_token_seconds=kv_token / bandwidth,
        num_blocks=int((0.9 * gpu.memory_bytes - weights - 4e9) / (16 * kv_token)),
        block_tokens=16,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=131072,
    )


PRESETS = {
    # Requests and tokens per step are vLLM's defaults for an API server: on 80 GB GPUs except the A100, and on others.
    "h100-llama-3.1-8b": derive(H100_SXM, LLAMA_3_1_8B, max_num_seqs=1024, max_num_batched_tokens=8192),
    "a100-qwen-2.5-14b": derive(A100_SXM_80, QWEN_2_5_14B, max_num_seqs=256, max_num_batched_tokens=2048),
    # 14,000 prompt tokens a second, 8 ms a step, room for a million tokens; what the strategies were first tried on.
    "round-figures": EngineParams(
        step_seconds=0.008,
        prefill_token_seconds=1 / 14000,
        decode_request_seconds=0.00006,
        kv_token_seconds=2.2e-8,
        num_blocks=65536,
        block_tokens=16,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_model_len=131072,
    ),
}
