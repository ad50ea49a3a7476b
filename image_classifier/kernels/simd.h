/* Vectors, and numbers of 16 bits.
 *
 * A vector has 16 floats on every processor: where registers are shorter, the compiler takes several. So a sum over the
 * lanes of a vector has one order, and results have the same bits, whatever the registers are. For the same reason each
 * multiply-add that is fused is written as one, and the compiler fuses no others. */
#ifndef SIMD_H
#define SIMD_H
#include <float.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { LANES = 16 };
#if defined(__AVX512F__)
#define WIDE 4 /* vectors of a micro-kernel's sums that are kept in registers together, for each of up to 6 rows */
enum { REGISTER = LANES };
#elif defined(__AVX2__)
#define WIDE 1
enum { REGISTER = 8 };
#else
#define WIDE 1
enum { REGISTER = 4 };
#endif

typedef float vec __attribute__((vector_size(LANES * 4), may_alias));
typedef float loose_vec __attribute__((vector_size(LANES * 4), may_alias, aligned(4)));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE vec load(const float *from) { return *(const loose_vec *)from; }
INLINE void store(float *to, vec value) { *(loose_vec *)to = value; }
INLINE vec splat(float x) { return (vec){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

/* factor * value + sum, rounded once */
INLINE vec multiply_add(vec factor, vec value, vec sum) { return __builtin_elementwise_fma(factor, value, sum); }
INLINE vec scale_add(float factor, vec value, vec sum) { return multiply_add(splat(factor), value, sum); }

/* A register of floats, for what treats each lane by itself, so that their number changes nothing. */
typedef float reg __attribute__((vector_size(REGISTER * 4), may_alias));
typedef float loose_reg __attribute__((vector_size(REGISTER * 4), may_alias, aligned(4)));

INLINE reg load_reg(const float *from) { return *(const loose_reg *)from; }
INLINE void store_reg(float *to, reg value) { *(loose_reg *)to = value; }
INLINE reg scale_add_reg(float factor, reg value, reg sum) {
    const reg none = {0};
    return __builtin_elementwise_fma(none + factor, value, sum);
}

/* As many floats as there are, up to a register of them; the rest is zeros. */
INLINE reg load_some_reg(const float *from, int64_t count) {
#if defined(__AVX512F__)
    return (reg)_mm512_maskz_loadu_ps((__mmask16)(count < LANES ? (1 << count) - 1 : -1), from);
#elif defined(__AVX2__)
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const int some = count < REGISTER ? (int)count : REGISTER;
    return (reg)_mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(some), lanes));
#else
    reg value = {0};
    if (count >= REGISTER) return load_reg(from);
    if (count > 0) memcpy(&value, from, (size_t)count * 4);
    return value;
#endif
}

INLINE vec load_some(const float *from, int64_t count) {
    reg parts[LANES / REGISTER];
    vec value;
    UNROLL for (int i = 0; i < LANES / REGISTER; i++)
        parts[i] = load_some_reg(from + i * REGISTER, count - i * REGISTER);
    memcpy(&value, parts, sizeof value);
    return value;
}

INLINE void store_some_reg(float *to, reg value, int64_t count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (__mmask16)(count < LANES ? (1 << count) - 1 : -1), (__m512)value);
#else
    float lanes[REGISTER];
    if (count >= REGISTER) {
        store_reg(to, value);
        return;
    }
    store_reg(lanes, value);
    for (int64_t i = 0; i < count; i++) to[i] = lanes[i];
#endif
}

INLINE void store_some(float *to, vec value, int64_t count) {
    reg parts[LANES / REGISTER];
    memcpy(parts, &value, sizeof value);
    UNROLL for (int i = 0; i < LANES / REGISTER; i++)
        store_some_reg(to + i * REGISTER, parts[i], count - i * REGISTER);
}

INLINE float sum_lanes(vec value) {
    float lanes[LANES];
    store(lanes, value);
    UNROLL for (int step = LANES / 2; step; step /= 2)
        UNROLL for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
    return lanes[0];
}

INLINE int64_t round_up(int64_t value) { return (value + LANES - 1) / LANES * LANES; }

typedef uint16_t bf16;

INLINE float widen_bf16(bf16 value) {
    const uint32_t bits = (uint32_t)value << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

INLINE bf16 narrow_bf16(float number) { /* to the nearest, of two as near to the even one */
    uint32_t bits;
    memcpy(&bits, &number, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return number != number ? 0x7fc0 : (bf16)rounded;
}

INLINE float widen_float(float value) { return value; }
INLINE float narrow_float(float value) { return value; }
#endif
