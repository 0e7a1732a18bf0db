// AdamW and Lion with states of 32, 8 or 4 bits, and weights of 32, 16, 8 or 4, on a CPU. A plain C interface: no Python and no PyTorch
// is linked, so that one build serves every version of both. step.inc is compiled once for each instruction set, and the best one is
// chosen at run time.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int BLOCK = 128;                // numbers that share a scale
constexpr int64_t BLOCKS_PER_THREAD = 64; // fewer are not worth a thread
enum Dtype { FP32 = 0, BF16 = 1, CODES8 = 2, CODES4 = 3 };  // codes: of a quantised weight

struct Bf16 { uint16_t bits; };
struct State { uint8_t* codes; float* scale; };

struct Scalars {  // as lowmem/optim/kernels/formats.py names them
    float step_size, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, rsqrt_correction2, grad_scale;
    uint32_t key;
    int64_t offset;
};

using Step = void (*)(State, const void*, State, State, const Scalars&, int64_t, int64_t, int64_t);

inline float as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

namespace baseline {
#include "step.inc"
}

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define LOWMEM_X86 1
#ifdef __clang__
#define TARGET_BEGIN(isa) _Pragma("clang attribute push(__attribute__((target(\"" isa "\"))), apply_to = function)")
#endif
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "step.inc"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "step.inc"
}
#pragma GCC pop_options
#endif

Step choose(int isa, int param_dtype, int grad_dtype, int bits, bool is_lion) {
#ifdef LOWMEM_X86
    if (isa == 2) return avx512::choose(param_dtype, grad_dtype, bits, is_lion);
    if (isa == 1) return avx2::choose(param_dtype, grad_dtype, bits, is_lion);
#endif
    return baseline::choose(param_dtype, grad_dtype, bits, is_lion);
}

}  // namespace

extern "C" {

// Changes whenever the meaning of an argument or of a stored bit does: cpu.py refuses a library of another number.
int lowmem_abi() { return 2; }

// 0: what every processor of this kind has, 1: AVX2, 2: AVX-512.
int lowmem_best_isa() {
#ifdef LOWMEM_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

// One step over `numel` numbers; returns 0, or 1 for a combination that does not exist. Memory: 3 KiB of stack a thread.
int lowmem_update(int isa, int threads, int is_lion, int bits, int param_dtype, int grad_dtype, void* param, float* param_scale,
                  const void* grad, void* exp_avg, float* exp_avg_scale, void* exp_avg_sq, float* exp_avg_sq_scale, int64_t numel,
                  const Scalars* scalars) {
    const Step step = choose(isa, param_dtype, grad_dtype, bits, is_lion != 0);
    if (step == nullptr) return 1;
    const State weight{static_cast<uint8_t*>(param), param_scale};
    const State m{static_cast<uint8_t*>(exp_avg), exp_avg_scale}, v{static_cast<uint8_t*>(exp_avg_sq), exp_avg_sq_scale};
    const int64_t blocks = (numel + BLOCK - 1) / BLOCK;
    const int64_t useful = blocks / BLOCKS_PER_THREAD;
    const int64_t parts = useful < 1 ? 1 : useful < threads ? useful : threads;
#pragma omp parallel for num_threads(int(parts)) schedule(static) if (parts > 1)
    for (int64_t part = 0; part < parts; ++part)
        step(weight, grad, m, v, *scalars, blocks * part / parts, blocks * (part + 1) / parts, numel);
    return 0;
}
}
