/* Kernels for steps of many images: pooling, GELU, batch norm and convolutions, for floats and for bf16. */
#include "kernels.h"
#include "simd.h"

enum { ROWS = 128 }; /* pixels whose sums are kept in floats before they are added to those in doubles */

/* e to a power that is not positive, to 2e-7 of the result. */
INLINE float exponential(float power) {
    const float scaled = (power < -87.0f ? -87.0f : power) * 1.44269504f;
    const float shifted = scaled + 12582912.0f; /* 1.5 * 2^23: what is added is rounded to a whole number */
    const float part = (scaled - (shifted - 12582912.0f)) * 0.693147181f;
    int32_t exponent;
    memcpy(&exponent, &shifted, 4);
    const int32_t bits = (exponent << 23) + 0x3f800000;
    float whole;
    memcpy(&whole, &bits, 4);
    static const float coefficients[] = {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
    float sum = 1.0f / 720.0f;
    UNROLL for (int i = 0; i < 6; i++) sum = __builtin_fmaf(sum, part, coefficients[i]);
    return whole * sum;
}

/* Twice the part of a normal distribution beyond |x|, to 1.5e-7 (Abramowitz, Stegun: 7.1.26); `bell` is exp(-x^2/2). */
INLINE float compute_tail(float x, float bell) {
    static const float coefficients[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
    const float t = 1.0f / __builtin_fmaf(0.3275911f * 0.707106781f, x < 0.0f ? -x : x, 1.0f);
    float sum = 1.061405429f;
    UNROLL for (int i = 0; i < 4; i++) sum = __builtin_fmaf(sum, t, coefficients[i]);
    return sum * t * bell;
}

/* The derivative of GELU: of x times the part of a normal distribution below x. */
INLINE float compute_slope_float(float x) {
    const float bell = exponential(-0.5f * x * x), tail = compute_tail(x, bell);
    return __builtin_fmaf(x * bell, 0.398942280f, 0.5f * (x < 0.0f ? tail : 2.0f - tail));
}

/* A half plus an odd polynomial of x, which is held between -edge and edge. */
INLINE float evaluate(const float *coefficients, const int count, float edge, float x) {
    const float some = x < -edge ? -edge : x, held = some > edge ? edge : some, square = held * held;
    float sum = coefficients[count - 1];
    UNROLL for (int i = count - 2; i >= 0; i--) sum = __builtin_fmaf(sum, square, coefficients[i]);
    return __builtin_fmaf(sum, held, 0.5f);
}

/* The same to 2e-4, which is a tenth of what rounding to 16 bits changes. */
INLINE float compute_slope_bf16(float x) {
    static const float coefficients[] = {0.797626138f,    -0.264925599f,   0.0586092435f,   -0.00881583616f,
                                         0.000940537313f, -7.12214023e-5f, 3.72189311e-6f,  -1.26803485e-7f,
                                         2.52127208e-9f,  -2.21075363e-11f};
    return evaluate(coefficients, 10, 4.5f, x);
}

/* The part of a normal distribution below x, to 1e-5. */
INLINE float compute_part(float x) {
    static const float coefficients[] = {0.398819208f,    -0.0661902651f,  0.00971876737f, -0.00107907446f, 8.84885594e-5f,
                                         -5.14745761e-6f, 1.98612739e-7f,  -4.51520821e-9f, 4.54695309e-11f};
    return evaluate(coefficients, 9, 4.25f, x);
}

void gelu_float(const struct gelu *a) {
    float *restrict out = a->out;
    const float *restrict values = a->values;
    for (int64_t i = 0; i < a->count; i++) {
        const float x = values[i], tail = compute_tail(x, exponential(-0.5f * x * x));
        out[i] = x * (0.5f * (x < 0.0f ? tail : 2.0f - tail));
    }
}

void gelu_bf16(const struct gelu *a) {
    bf16 *restrict out = a->out;
    const bf16 *restrict values = a->values;
    for (int64_t i = 0; i < a->count; i++) {
        const float x = widen_bf16(values[i]);
        out[i] = narrow_bf16(x * compute_part(x));
    }
}

/* How convolutions read, write and multiply: floats, and pairs of bf16 in a word (VNNI layout). */
INLINE reg read_float(const float *from, int64_t count) { return load_some_reg(from, count); }
INLINE void write_float(float *to, reg value, int64_t count) { store_some_reg(to, value, count); }
INLINE void store_channels_float(uint32_t *to, reg value) { store_reg((float *)to, value); }
INLINE void store_words_float(uint32_t *to, reg first, reg second) {
    (void)second;
    store_reg((float *)to, first);
}
INLINE vec add_products_float(vec sum, const uint32_t *left, vec right) {
    float factor;
    memcpy(&factor, left, 4);
    return scale_add(factor, right, sum);
}

#if defined(__AVX512BF16__)
INLINE vec read_bf16(const bf16 *from, int64_t count) {
    const __mmask16 mask = (__mmask16)(count < LANES ? (1 << count) - 1 : -1);
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16);
}
INLINE void write_bf16(bf16 *to, vec value, int64_t count) {
    const __mmask16 mask = (__mmask16)(count < LANES ? (1 << count) - 1 : -1);
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh((__m512)value));
}
INLINE void store_channels_bf16(uint32_t *to, vec value) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)value));
}
INLINE void store_words_bf16(uint32_t *to, vec first, vec second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
INLINE vec add_products_bf16(vec sum, const uint32_t *left, vec right) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)*left), (__m512bh)right);
}
#endif

#define real bf16
#define compute_slope compute_slope_bf16
#define widen widen_bf16
#define narrow narrow_bf16
#define NAME(kernel) kernel##_bf16
#include "pixels.h"
#if defined(__AVX512BF16__)
#define DEPTH 2
#include "winograd.h"
#undef DEPTH
#endif
#undef real
#undef compute_slope
#undef widen
#undef narrow
#undef NAME
#define real float
#define compute_slope compute_slope_float
#define widen widen_float
#define narrow narrow_float
#define NAME(kernel) kernel##_float
#include "pixels.h"
#define DEPTH 1
#include "winograd.h"
#include "products.h"

#if defined(__AMX_BF16__)
#include "amx.h"
#endif
