/* What a device gives at most: reading its memory once in order, and multiply-adds in registers. No ops: a benchmark
 * puts their rates beside an op's (benchmarks/hip.py). Each is launched twice, and the second time counts. */
#include "runtime.h"

namespace
{

const int BLOCK = 256;
const int CHAINS = 16; /* of fmaf in each thread, none of which waits for another */
#if defined(__HIPCC__) || defined(__CUDACC__)
const int64_t BLOCKS = 8192;
const int ROUNDS = 4096;
#else
const int64_t BLOCKS = 8; /* the host build's rates mean nothing */
const int ROUNDS = 64;
#endif

/* sums [BLOCKS * BLOCK]: of what each thread read, 16 bytes at a time */
__global__ void __launch_bounds__(256) roof_read_v1(float *sums, const float4 *data, int64_t n)
{
    const int64_t step = static_cast<int64_t>(gridDim.x) * BLOCK,
                  me = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x;
    float sum = 0.0f;
    for (int64_t i = me; i < n; i += step) {
        const float4 v = data[i];
        sum += (v.x + v.y) + (v.z + v.w);
    }
    sums[me] = sum;
}

__global__ void __launch_bounds__(256) roof_fma_v1(float *sums, float a, float b)
{
    float chain[CHAINS];
    KL_UNROLL
    for (int c = 0; c < CHAINS; c++)
        chain[c] = static_cast<float>(c) + static_cast<float>(threadIdx.x);
    for (int i = 0; i < ROUNDS; i++) {
        KL_UNROLL
        for (int c = 0; c < CHAINS; c++)
            chain[c] = fmaf(chain[c], a, b);
    }
    float sum = 0.0f;
    KL_UNROLL
    for (int c = 0; c < CHAINS; c++)
        sum += chain[c];
    sums[static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x] = sum;
}

struct events {
    hipEvent_t begin = nullptr, end = nullptr;
    ~events()
    {
        if (begin != nullptr)
            (void)hipEventDestroy(begin);
        if (end != nullptr)
            (void)hipEventDestroy(end);
    }
};

/* seconds of the second of two launches */
template <class LAUNCH> hipError_t seconds_of(hipStream_t stream, LAUNCH launch, double *seconds)
{
    events e;
    float ms = 0.0f;
    hipError_t error = hipEventCreate(&e.begin);
    if (error == hipSuccess)
        error = hipEventCreate(&e.end);
    if (error != hipSuccess)
        return error;
    launch();
    error = hipEventRecord(e.begin, stream);
    launch();
    if (error == hipSuccess)
        error = hipEventRecord(e.end, stream);
    if (error == hipSuccess)
        error = hipGetLastError();
    if (error == hipSuccess)
        error = hipEventSynchronize(e.end);
    if (error == hipSuccess)
        error = hipEventElapsedTime(&ms, e.begin, e.end);
    *seconds = 1e-3 * static_cast<double>(ms);
    return error;
}

kl_status failed(kl_ctx *ctx, const char *what, hipError_t error)
{
    (void)hipGetLastError();
    return kl_core_of->fail(ctx, KL_ERR_DEVICE, "%s: %s", what, hipGetErrorString(error));
}

} // namespace

hipError_t kl_look_for_code()
{
    hipFuncAttributes unused;
    return hipFuncGetAttributes(&unused, reinterpret_cast<const void *>(roof_fma_v1));
}

kl_status hip_roof_read(kl_ctx *ctx, const void *data, int64_t n_bytes, double *rate)
{
    float *sums;
    double seconds = 0.0;
    const int64_t n = n_bytes / static_cast<int64_t>(sizeof(float4));
    if (n < 1 || reinterpret_cast<uintptr_t>(data) % sizeof(float4) != 0)
        return kl_core_of->fail(ctx, KL_ERR_ARG,
                                "roof_read: %lld bytes; it must be at least 16, aligned to 16",
                                static_cast<long long>(n_bytes));
    KL_SCRATCH_OF(sums, ctx, BLOCKS * BLOCK);
    const float4 *values = static_cast<const float4 *>(data);
    const hipStream_t stream = kl_stream(ctx);
    const auto launch = [=] {
        KL_LAUNCH(roof_read_v1, kl_grid(BLOCKS), BLOCK, 0, stream, sums, values, n);
    };
    const hipError_t error = seconds_of(stream, launch, &seconds);
    if (error != hipSuccess)
        return failed(ctx, "roof_read", error);
    *rate = static_cast<double>(n * static_cast<int64_t>(sizeof(float4))) / seconds;
    return KL_OK;
}

kl_status hip_roof_fma(kl_ctx *ctx, double *rate)
{
    float *sums;
    double seconds = 0.0;
    KL_SCRATCH_OF(sums, ctx, BLOCKS * BLOCK);
    const hipStream_t stream = kl_stream(ctx);
    const auto launch = [=] {
        KL_LAUNCH(roof_fma_v1, kl_grid(BLOCKS), BLOCK, 0, stream, sums, 0.999f, 0.001f);
    };
    const hipError_t error = seconds_of(stream, launch, &seconds);
    if (error != hipSuccess)
        return failed(ctx, "roof_fma", error);
    *rate = 2.0 * CHAINS * ROUNDS * static_cast<double>(BLOCKS * BLOCK) / seconds;
    return KL_OK;
}
