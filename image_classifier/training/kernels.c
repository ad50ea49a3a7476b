/* Operations of a training step, for what torch's own are slow at: steps of a few images.
 *
 * Each kernel takes an array of 64-bit words: pointers, sizes, strides in elements. Images are planes of floats, one
 * channel after the other. What is summed in which order is written out, so that equal processors give equal bits.
 * Plain GNU C, for gcc and clang; the vector types become whatever registers the target has.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define WIDE 4 /* vectors of pixels that are kept in registers together, for each of up to 6 channels */
#else
#define LANES 8
#define WIDE 2
#endif

typedef float vec __attribute__((vector_size(LANES * 4), may_alias));
typedef float loose_vec __attribute__((vector_size(LANES * 4), may_alias, aligned(4)));
typedef float half_vec __attribute__((vector_size(LANES * 2), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE vec load(const float *from) { return *(const loose_vec *)from; }
INLINE void store(float *to, vec value) { *(loose_vec *)to = value; }

INLINE vec load_part(const float *from, int64_t count) {
    vec value = {0};
    memcpy(&value, from, (size_t)count * 4);
    return value;
}

INLINE void store_part(float *to, vec value, int64_t count) { memcpy(to, &value, (size_t)count * 4); }

INLINE float sum_lanes(vec value) {
    half_vec halves[2], half;
    float lanes[LANES / 2];
    memcpy(halves, &value, sizeof value);
    half = halves[0] + halves[1];
    memcpy(lanes, &half, sizeof half);
    for (int step = LANES / 4; step; step /= 2)
        for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
    return lanes[0];
}

INLINE int64_t round_up(int64_t value) { return (value + LANES - 1) / LANES * LANES; }

/* Copies an image's planes to ones with `pad` zeros around them; their rows are `pitch` apart, which leaves `pitch`
 * minus `width` zeros between. Zeros stand after the last plane too. */
static void pack_planes(float *to, const float *from, const int64_t *strides, int64_t channels, int64_t height,
                        int64_t width, int64_t pad, int64_t pitch, int64_t plane) {
    memset(to, 0, (size_t)(channels * plane) * 4);
    for (int64_t c = 0; c < channels; c++)
        for (int64_t y = 0; y < height; y++) {
            float *row = to + c * plane + (y + pad) * pitch + pad;
            const float *source = from + c * strides[1] + y * strides[2];
            if (strides[3] == 1)
                memcpy(row, source, (size_t)width * 4);
            else
                for (int64_t x = 0; x < width; x++) row[x] = source[x * strides[3]];
        }
}

/* For some output channels and `wide` vectors of pixels: bias plus the sum over all taps of weight times pixel. */
INLINE void correlate_pixels(float *out, int64_t out_plane, const float *image, int64_t plane, int64_t pitch,
                             const float *weights, const float *bias, int64_t channels, int64_t height, int64_t width,
                             const int outputs, const int wide) {
    vec sums[6][WIDE];
    UNROLL for (int o = 0; o < outputs; o++) UNROLL for (int i = 0; i < wide; i++) sums[o][i] = (vec){0} + bias[o];
    for (int64_t c = 0; c < channels; c++)
        for (int64_t ky = 0; ky < height; ky++) {
            const float *row = image + c * plane + ky * pitch;
            for (int64_t kx = 0; kx < width; kx++, row++, weights += outputs) {
                vec pixels[WIDE];
                UNROLL for (int i = 0; i < wide; i++) pixels[i] = load(row + i * LANES);
                UNROLL for (int o = 0; o < outputs; o++)
                    UNROLL for (int i = 0; i < wide; i++) sums[o][i] += pixels[i] * weights[o];
            }
        }
    UNROLL for (int o = 0; o < outputs; o++)
        UNROLL for (int i = 0; i < wide; i++) store(out + o * out_plane + i * LANES, sums[o][i]);
}

INLINE void correlate_block(float *out, int64_t out_plane, const float *image, int64_t plane, int64_t pitch,
                            const float *weights, const float *bias, int64_t channels, int64_t height, int64_t width,
                            int64_t vectors, const int outputs) {
    int64_t i = 0;
    for (; i + WIDE <= vectors; i += WIDE)
        correlate_pixels(out + i * LANES, out_plane, image + i * LANES, plane, pitch, weights, bias, channels, height,
                         width, outputs, WIDE);
    for (; i < vectors; i++)
        correlate_pixels(out + i * LANES, out_plane, image + i * LANES, plane, pitch, weights, bias, channels, height,
                         width, outputs, 1);
}

/* Convolution with stride 1; with weights in the other order and mirrored, the gradient of its input.
 * All output pixels of an image are computed as one row, with those between the rows, which are thrown away.
 * 0 out [N, O, OH, OW] contiguous, 1 images, 2 weights, 3 bias or 0, 4 scratch, 5 N, 6 C, 7 H, 8 W, 9 O, 10 KH, 11 KW,
 * 12 pad, 13 where the weights begin, 14 strides of images (4), 18 strides of weights (4) */
static void convolve(const int64_t *a) {
    float *out = (float *)a[0];
    const float *images = (const float *)a[1], *weights = (const float *)a[2] + a[13], *bias = (const float *)a[3];
    const int64_t number = a[5], channels = a[6], height = a[7], width = a[8], outputs = a[9], kh = a[10], kw = a[11];
    const int64_t pad = a[12], *image_strides = a + 14, *weight_strides = a + 18;
    const int64_t pitch = width + 2 * pad, plane = (height + 2 * pad) * pitch;
    const int64_t out_height = height + 2 * pad - kh + 1, out_width = pitch - kw + 1;
    const int64_t vectors = round_up((out_height - 1) * pitch + out_width) / LANES, out_plane = vectors * LANES;
    const int64_t taps = channels * kh * kw;
    float *packed = (float *)a[4], *biases = packed + taps * outputs, *planes = biases + outputs;
    float *rows = planes + channels * plane + (WIDE + 1) * LANES + kw;

    for (int64_t first = 0; first < outputs; first += 6) {
        int64_t some = outputs - first < 6 ? outputs - first : 6;
        float *to = packed + first * taps;
        for (int64_t c = 0; c < channels; c++)
            for (int64_t ky = 0; ky < kh; ky++)
                for (int64_t kx = 0; kx < kw; kx++)
                    for (int64_t o = first; o < first + some; o++)
                        *to++ = weights[o * weight_strides[0] + c * weight_strides[1] + ky * weight_strides[2] +
                                        kx * weight_strides[3]];
    }
    for (int64_t o = 0; o < outputs; o++) biases[o] = bias ? bias[o] : 0.0f;
    memset(planes + channels * plane, 0, (size_t)((WIDE + 1) * LANES + kw) * 4);
    for (int64_t n = 0; n < number; n++) {
        pack_planes(planes, images + n * image_strides[0], image_strides, channels, height, width, pad, pitch, plane);
        for (int64_t first = 0; first < outputs; first += 6) {
            const float *w = packed + first * taps, *b = biases + first;
            int64_t some = outputs - first < 6 ? outputs - first : 6;
            switch (some) {
#define CASE(count)                                                                                                    \
    case count: correlate_block(rows, out_plane, planes, plane, pitch, w, b, channels, kh, kw, vectors, count); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
            }
            for (int64_t o = 0; o < some; o++)
                for (int64_t y = 0; y < out_height; y++)
                    memcpy(out + ((n * outputs + first + o) * out_height + y) * out_width,
                           rows + o * out_plane + y * pitch, (size_t)out_width * 4);
        }
    }
}

/* For some output channels and a row of taps: the sum over all pixels of image times gradient. */
INLINE void correlate_taps(float *gradient, const int64_t *strides, const float *planes, int64_t image,
                           const float *outer, int64_t outer_plane, int64_t outer_image, int64_t number,
                           const int outputs, const int taps) {
    vec sums[4][5];
    UNROLL for (int o = 0; o < outputs; o++) UNROLL for (int k = 0; k < taps; k++) sums[o][k] = (vec){0};
    for (int64_t n = 0; n < number; n++, planes += image, outer += outer_image)
        for (int64_t q = 0; q < outer_plane; q += LANES) {
            vec grads[4];
            UNROLL for (int o = 0; o < outputs; o++) grads[o] = load(outer + o * outer_plane + q);
            UNROLL for (int k = 0; k < taps; k++) {
                vec pixels = load(planes + q + k);
                UNROLL for (int o = 0; o < outputs; o++) sums[o][k] += grads[o] * pixels;
            }
        }
    UNROLL for (int o = 0; o < outputs; o++)
        UNROLL for (int k = 0; k < taps; k++) gradient[o * strides[0] + k * strides[3]] = sum_lanes(sums[o][k]);
}

/* The gradients of a convolution's weights and bias.
 * 0 gradient or 0, 1 gradient of the bias or 0, 2 images, 3 gradient of the output, 4 scratch, 5 N, 6 C, 7 H, 8 W, 9 O,
 * 10 KH, 11 KW (at most 5), 12 pad, 13 strides of images (4), 17 of the output's gradient (4), 21 of the gradient (4) */
static void convolve_weights(const int64_t *a) {
    float *gradient = (float *)a[0], *bias = (float *)a[1];
    const float *images = (const float *)a[2], *outer = (const float *)a[3];
    const int64_t number = a[5], channels = a[6], height = a[7], width = a[8], outputs = a[9], kh = a[10], kw = a[11];
    const int64_t pad = a[12], *image_strides = a + 13, *outer_strides = a + 17, *strides = a + 21;
    const int64_t pitch = width + 2 * pad, plane = (height + 2 * pad) * pitch;
    const int64_t out_height = height + 2 * pad - kh + 1, out_width = pitch - kw + 1;
    const int64_t outer_plane = round_up((out_height - 1) * pitch + out_width);
    float *planes = (float *)a[4], *outers = planes + number * channels * plane + pitch + 2 * LANES;

    memset(planes + number * channels * plane, 0, (size_t)(pitch + 2 * LANES) * 4);
    for (int64_t n = 0; n < number; n++) {
        pack_planes(planes + n * channels * plane, images + n * image_strides[0], image_strides, channels, height,
                    width, pad, pitch, plane);
        pack_planes(outers + n * outputs * outer_plane, outer + n * outer_strides[0], outer_strides, outputs,
                    out_height, out_width, 0, pitch, outer_plane);
    }
    for (int64_t o = 0; gradient && o < outputs;) {
        const int64_t some = outputs - o >= 4 && LANES == 16 ? 4 : outputs - o >= 2 ? 2 : 1;
        for (int64_t c = 0; c < channels; c++)
            for (int64_t ky = 0; ky < kh; ky++) {
                float *to = gradient + o * strides[0] + c * strides[1] + ky * strides[2];
                const float *from = planes + c * plane + ky * pitch, *grads = outers + o * outer_plane;
                switch (some * 8 + kw) {
#define CASE(count, taps)                                                                                              \
    case count * 8 + taps:                                                                                             \
        correlate_taps(to, strides, from, channels *plane, grads, outer_plane, outputs *outer_plane, number, count,    \
                       taps);                                                                                          \
        break;
#define CASES(count) CASE(count, 1) CASE(count, 2) CASE(count, 3) CASE(count, 4) CASE(count, 5)
                    CASES(1) CASES(2) CASES(4)
#undef CASES
#undef CASE
                }
            }
        o += some;
    }
    for (int64_t o = 0; bias && o < outputs; o++) {
        vec sum = {0};
        for (int64_t n = 0; n < number; n++)
            for (int64_t q = 0; q < outer_plane; q += LANES) sum += load(outers + (n * outputs + o) * outer_plane + q);
        bias[o] = sum_lanes(sum);
    }
}

/* Maximum of 2x2 pixels, and which of the four it is; the first of equal ones, and not a number if one of them is.
 * 0 out, 1 indices (bytes), 2 images, 3 planes, 4 H, 5 W */
static void pool(const int64_t *a) {
    float *restrict out = (float *)a[0];
    uint8_t *restrict indices = (uint8_t *)a[1];
    const int64_t planes = a[3], height = a[4], width = a[5], out_height = height / 2, out_width = width / 2;
    for (int64_t p = 0; p < planes; p++)
        for (int64_t y = 0; y < out_height; y++, out += out_width, indices += out_width) {
            const float *upper = (const float *)a[2] + (p * height + 2 * y) * width, *lower = upper + width;
            for (int64_t x = 0; x < out_width; x++) {
                float best = upper[2 * x];
                int which = 0;
                const float rest[3] = {upper[2 * x + 1], lower[2 * x], lower[2 * x + 1]};
                for (int i = 0; i < 3; i++) {
                    const int better = rest[i] > best || rest[i] != rest[i];
                    best = better ? rest[i] : best;
                    which = better ? i + 1 : which;
                }
                out[x] = best;
                indices[x] = (uint8_t)which;
            }
        }
}

INLINE void unpool_rows(float *upper, float *lower, const float *restrict gradient, const uint8_t *restrict indices,
                        int64_t width, const int64_t stride) {
    for (int64_t x = 0; x < width; x++) {
        upper[2 * x] = indices[x] == 0 ? gradient[x * stride] : 0.0f;
        upper[2 * x + 1] = indices[x] == 1 ? gradient[x * stride] : 0.0f;
        lower[2 * x] = indices[x] == 2 ? gradient[x * stride] : 0.0f;
        lower[2 * x + 1] = indices[x] == 3 ? gradient[x * stride] : 0.0f;
    }
}

/* 0 gradient of the images, 1 indices, 2 gradient of what was pooled, 3 N, 4 C, 5 H, 6 W, 7 strides of 2 (4) */
static void unpool(const int64_t *a) {
    float *out = (float *)a[0];
    const uint8_t *indices = (const uint8_t *)a[1];
    const int64_t number = a[3], channels = a[4], height = a[5], width = a[6], *strides = a + 7;
    if (height % 2 || width % 2) memset(out, 0, (size_t)(number * channels * height * width) * 4);
    for (int64_t n = 0; n < number; n++)
        for (int64_t c = 0; c < channels; c++, out += height * width)
            for (int64_t y = 0; y < height / 2; y++, indices += width / 2) {
                const float *gradient = (const float *)a[2] + n * strides[0] + c * strides[1] + y * strides[2];
                float *upper = out + 2 * y * width, *lower = upper + width;
                if (strides[3] == 1)
                    unpool_rows(upper, lower, gradient, indices, width / 2, 1);
                else
                    unpool_rows(upper, lower, gradient, indices, width / 2, strides[3]);
            }
}

/* 0 out, 1 in, 2 count */
static void rectify(const int64_t *a) {
    float *restrict out = (float *)a[0];
    const float *restrict in = (const float *)a[1];
    for (int64_t i = 0; i < a[2]; i++) out[i] = in[i] > 0.0f || in[i] != in[i] ? in[i] : 0.0f;
}

/* 0 gradient of the input, 1 gradient of the output, 2 the output, 3 count */
static void rectify_gradient(const int64_t *a) {
    float *restrict out = (float *)a[0];
    const float *restrict gradient = (const float *)a[1], *restrict value = (const float *)a[2];
    for (int64_t i = 0; i < a[3]; i++) out[i] = value[i] <= 0.0f ? 0.0f : gradient[i];
}

INLINE void multiply_block(float *out, int64_t columns, const float *left, int64_t left_row, int64_t left_column,
                           const float *right, int64_t right_row, const float *bias, int64_t depth, int64_t part,
                           const int rows, const int wide) {
    vec sums[4][WIDE];
    UNROLL for (int i = 0; i < wide; i++) {
        vec start = {0};
        if (bias) start = part ? load_part(bias, part) : load(bias + i * LANES);
        UNROLL for (int r = 0; r < rows; r++) sums[r][i] = start;
    }
    for (int64_t k = 0; k < depth; k++)
        UNROLL for (int i = 0; i < wide; i++) {
            const float *from = right + k * right_row + i * LANES;
            const vec values = part ? load_part(from, part) : load(from);
            UNROLL for (int r = 0; r < rows; r++) sums[r][i] += values * left[r * left_row + k * left_column];
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < wide; i++)
            if (part)
                store_part(out + r * columns, sums[r][i], part);
            else
                store(out + r * columns + i * LANES, sums[r][i]);
}

/* Matrix product whose right side has its rows contiguous.
 * 0 out [M, N] contiguous, 1 left [M, K], 2 right [K, N], 3 bias [N] or 0, 4 M, 5 K, 6 N, 7 strides of left (2),
 * 9 stride of right's rows */
static void multiply(const int64_t *a) {
    const float *left = (const float *)a[1], *right = (const float *)a[2], *bias = (const float *)a[3];
    const int64_t rows = a[4], depth = a[5], columns = a[6], left_row = a[7], left_column = a[8], right_row = a[9];
    float *out = (float *)a[0];
    for (int64_t m = 0; m < rows;) {
        const int64_t some = rows - m >= 4 ? 4 : 1;
        int64_t n = 0;
#define BLOCK(wide, part)                                                                                              \
    if (some == 4)                                                                                                     \
        multiply_block(out + m * columns + n, columns, left + m * left_row, left_row, left_column, right + n,          \
                       right_row, bias ? bias + n : 0, depth, part, 4, wide);                                          \
    else                                                                                                               \
        multiply_block(out + m * columns + n, columns, left + m * left_row, left_row, left_column, right + n,          \
                       right_row, bias ? bias + n : 0, depth, part, 1, wide)
        for (; n + WIDE * LANES <= columns; n += WIDE * LANES) { BLOCK(WIDE, 0); }
        for (; n + LANES <= columns; n += LANES) { BLOCK(1, 0); }
        if (n < columns) { BLOCK(1, columns - n); }
#undef BLOCK
        m += some;
    }
}

INLINE void multiply_dots(float *out, int64_t columns, const float *left, int64_t left_row, const float *right,
                          int64_t right_column, const float *bias, int64_t depth, const int rows, const int wide) {
    vec sums[4][WIDE];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < wide; i++) sums[r][i] = (vec){0};
    const int64_t whole = depth / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES)
        UNROLL for (int i = 0; i < wide; i++) {
            const vec values = load(right + i * right_column + k);
            UNROLL for (int r = 0; r < rows; r++) sums[r][i] += values * load(left + r * left_row + k);
        }
    if (whole < depth)
        UNROLL for (int i = 0; i < wide; i++) {
            const vec values = load_part(right + i * right_column + whole, depth - whole);
            UNROLL for (int r = 0; r < rows; r++)
                sums[r][i] += values * load_part(left + r * left_row + whole, depth - whole);
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < wide; i++)
            out[r * columns + i] = sum_lanes(sums[r][i]) + (bias ? bias[i] : 0.0f);
}

/* Matrix product whose left side has its rows contiguous and whose right side its columns.
 * 0 out [M, N] contiguous, 1 left [M, K], 2 right [K, N], 3 bias [N] or 0, 4 M, 5 K, 6 N, 7 stride of left's rows,
 * 8 stride of right's columns */
static void multiply_transposed(const int64_t *a) {
    const float *left = (const float *)a[1], *right = (const float *)a[2], *bias = (const float *)a[3];
    const int64_t rows = a[4], depth = a[5], columns = a[6], left_row = a[7], right_column = a[8];
    float *out = (float *)a[0];
    for (int64_t m = 0; m < rows;) {
        const int64_t some = rows - m >= 4 ? 4 : 1;
        for (int64_t n = 0; n < columns;) {
            const int64_t wide = columns - n >= WIDE ? WIDE : 1;
#define BLOCK(rows, wide)                                                                                              \
    multiply_dots(out + m * columns + n, columns, left + m * left_row, left_row, right + n * right_column,             \
                  right_column, bias ? bias + n : 0, depth, rows, wide)
            if (some == 4 && wide == WIDE)
                BLOCK(4, WIDE);
            else if (some == 4)
                BLOCK(4, 1);
            else if (wide == WIDE)
                BLOCK(1, WIDE);
            else
                BLOCK(1, 1);
#undef BLOCK
            n += wide;
        }
        m += some;
    }
}

/* 0 out [N], 1 in [M, N] contiguous, 2 M, 3 N */
static void sum_rows(const int64_t *a) {
    float *restrict out = (float *)a[0];
    const float *restrict in = (const float *)a[1];
    memcpy(out, in, (size_t)a[3] * 4);
    for (int64_t m = 1; m < a[2]; m++)
        for (int64_t n = 0; n < a[3]; n++) out[n] += in[m * a[3] + n];
}

/* 0 out, 1 in, 2 bytes */
static void copy(const int64_t *a) { memcpy((void *)a[0], (const void *)a[1], (size_t)a[2]); }

/* 0 out (floats), 1 in (bytes), 2 count */
static void convert(const int64_t *a) {
    float *restrict out = (float *)a[0];
    const uint8_t *restrict in = (const uint8_t *)a[1];
    for (int64_t i = 0; i < a[2]; i++) out[i] = in[i];
}

/* 0 out [N, C, P], 1 in, 2 a number a channel [C], 3 N, 4 C, 5 P, 6 whether to divide by it or to subtract it */
static void shift_channels(const int64_t *a) {
    float *restrict out = (float *)a[0];
    const float *restrict in = (const float *)a[1];
    for (int64_t n = 0; n < a[3]; n++)
        for (int64_t c = 0; c < a[4]; c++, out += a[5], in += a[5]) {
            const float value = ((const float *)a[2])[c];
            if (a[6])
                for (int64_t i = 0; i < a[5]; i++) out[i] = in[i] / value;
            else
                for (int64_t i = 0; i < a[5]; i++) out[i] = in[i] - value;
        }
}

/* 0 out [M, N], 1 in, 2 M, 3 N */
static void log_softmax(const int64_t *a) {
    for (int64_t m = 0; m < a[2]; m++) {
        float *out = (float *)a[0] + m * a[3], sum = 0.0f;
        const float *in = (const float *)a[1] + m * a[3];
        float most = in[0];
        for (int64_t n = 1; n < a[3]; n++) most = in[n] > most || in[n] != in[n] ? in[n] : most;
        for (int64_t n = 0; n < a[3]; n++) sum += expf(in[n] - most);
        const float log_sum = most + logf(sum);
        for (int64_t n = 0; n < a[3]; n++) out[n] = in[n] - log_sum;
    }
}

/* 0 gradient of the input [M, N], 1 gradient of the output, 2 the output, 3 M, 4 N */
static void log_softmax_gradient(const int64_t *a) {
    for (int64_t m = 0; m < a[3]; m++) {
        const int64_t row = m * a[4];
        float *out = (float *)a[0] + row, sum = 0.0f;
        const float *gradient = (const float *)a[1] + row, *value = (const float *)a[2] + row;
        for (int64_t n = 0; n < a[4]; n++) sum += gradient[n];
        for (int64_t n = 0; n < a[4]; n++) out[n] = gradient[n] - expf(value[n]) * sum;
    }
}

/* The mean of the negative logarithms of the labels' probabilities; not a number if a label is none of the classes.
 * 0 loss [], 1 weight [] (the count), 2 logarithms [M, N], 3 labels [M], 4 M, 5 N */
static void likelihood(const int64_t *a) {
    float sum = 0.0f;
    for (int64_t m = 0; m < a[4]; m++) {
        const int64_t label = ((const int64_t *)a[3])[m];
        sum -= label >= 0 && label < a[5] ? ((const float *)a[2])[m * a[5] + label] : NAN;
    }
    *(float *)a[1] = (float)a[4];
    *(float *)a[0] = sum / (float)a[4];
}

/* 0 gradient of the logarithms [M, N], 1 gradient of the loss [], 2 labels [M], 3 M, 4 N */
static void likelihood_gradient(const int64_t *a) {
    float *out = (float *)a[0];
    memset(out, 0, (size_t)(a[3] * a[4]) * 4);
    for (int64_t m = 0; m < a[3]; m++) {
        const int64_t label = ((const int64_t *)a[2])[m];
        if (label >= 0 && label < a[4]) out[m * a[4] + label] = -*(const float *)a[1] / (float)a[3];
    }
}

/* 0 out [M] (the first of equal ones, and what is not a number before all), 1 in [M, N], 2 M, 3 N */
static void find_largest(const int64_t *a) {
    for (int64_t m = 0; m < a[2]; m++) {
        const float *in = (const float *)a[1] + m * a[3];
        int64_t which = 0;
        for (int64_t n = 1; n < a[3] && in[which] == in[which]; n++)
            if (in[n] > in[which] || in[n] != in[n]) which = n;
        ((int64_t *)a[0])[m] = which;
    }
}

/* 0 out (bytes), 1 left, 2 right (64-bit numbers), 3 count */
static void compare(const int64_t *a) {
    for (int64_t i = 0; i < a[3]; i++)
        ((uint8_t *)a[0])[i] = ((const int64_t *)a[1])[i] == ((const int64_t *)a[2])[i];
}

/* 0 out (a 64-bit number), 1 in (bytes that are 0 or 1), 2 count */
static void count(const int64_t *a) {
    int64_t sum = 0;
    for (int64_t i = 0; i < a[2]; i++) sum += ((const uint8_t *)a[1])[i];
    *(int64_t *)a[0] = sum;
}

/* ---- Steps of many images: channels stand next to each other, as bf16 or floats; the work is split over threads. ---- */

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
    const float sum = 1.0f / 720.0f * part + 1.0f / 120.0f;
    return whole * (((((sum * part + 1.0f / 24.0f) * part + 1.0f / 6.0f) * part + 0.5f) * part + 1.0f) * part + 1.0f);
}

/* Twice the part of a normal distribution beyond |x|, to 1.5e-7 (Abramowitz, Stegun: 7.1.26); `bell` is exp(-x^2/2). */
INLINE float compute_tail(float x, float bell) {
    const float t = 1.0f / (1.0f + 0.3275911f * 0.707106781f * (x < 0.0f ? -x : x));
    return ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t * bell;
}

/* The derivative of GELU: of x times the part of a normal distribution below x. */
INLINE float compute_slope_float(float x) {
    const float bell = exponential(-0.5f * x * x), tail = compute_tail(x, bell);
    return 0.5f * (x < 0.0f ? tail : 2.0f - tail) + x * bell * 0.398942280f;
}

/* A half plus an odd polynomial of x, which is held between -edge and edge. */
INLINE float evaluate(const float *coefficients, const int count, float edge, float x) {
    const float some = x < -edge ? -edge : x, held = some > edge ? edge : some, square = held * held;
    float sum = coefficients[count - 1];
    UNROLL for (int i = count - 2; i >= 0; i--) sum = sum * square + coefficients[i];
    return sum * held + 0.5f;
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

/* As many floats as there are, up to a vector of them; the rest is zeros. */
INLINE vec load_some(const float *from, int64_t count) {
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps((__mmask16)(count < LANES ? (1 << count) - 1 : -1), from);
#else
    return count < LANES ? load_part(from, count) : load(from);
#endif
}

INLINE void store_some(float *to, vec value, int64_t count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (__mmask16)(count < LANES ? (1 << count) - 1 : -1), (__m512)value);
#else
    if (count < LANES)
        store_part(to, value, count);
    else
        store(to, value);
#endif
}

/* How the kernels of convolutions read, write and multiply: floats, and pairs of 16 bits. */
INLINE vec read_float(const float *from, int64_t count) { return load_some(from, count); }
INLINE void write_float(float *to, vec value, int64_t count) { store_some(to, value, count); }
INLINE void store_channels_float(uint32_t *to, vec value) { store((float *)to, value); }
INLINE void store_words_float(uint32_t *to, vec value, vec same) {
    (void)same;
    store((float *)to, value);
}
INLINE vec add_products_float(vec sum, const uint32_t *left, vec right) {
    float factor;
    memcpy(&factor, left, 4);
    return sum + right * factor;
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

enum { ROWS = 128 }; /* pixels whose sums are kept in floats before they are added to those in doubles */

#define real bf16
#define compute_slope compute_slope_bf16
#define widen widen_bf16
#define narrow narrow_bf16
#define NAME(kernel) kernel##_bf16
#include "kernels_large.h"
#if defined(__AVX512BF16__)
#define DEPTH 2
#include "kernels_winograd.h"
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
#include "kernels_large.h"
#define DEPTH 1
#include "kernels_winograd.h"

/* 0 out, 1 in, 2 count, 3 threads */
static void gelu_bf16(const int64_t *a) {
    bf16 *restrict out = (bf16 *)a[0];
    const bf16 *restrict in = (const bf16 *)a[1];
#pragma omp parallel for num_threads((int)a[3]) schedule(static)
    for (int64_t i = 0; i < a[2]; i++) {
        const float x = widen_bf16(in[i]);
        out[i] = narrow_bf16(x * compute_part(x));
    }
}

#ifdef __AMX_BF16__
#include "kernels_tiles.h"
#endif

typedef void kernel(const int64_t *);
kernel *const kernels[] = {
    convolve, convolve_weights, pool, unpool, rectify, rectify_gradient, multiply, multiply_transposed, sum_rows,
    copy, convert, shift_channels, log_softmax, log_softmax_gradient, likelihood, likelihood_gradient, find_largest,
    compare, count, pool_bf16, pool_float, unpool_bf16, unpool_float, gelu_gradient_bf16,
    gelu_gradient_float, sum_channels_bf16, sum_channels_float, scale_channels_bf16, scale_channels_float,
    gelu_bf16, transform_filters_float, convolve_tiles_float, correlate_tiles_float,
#ifdef __AVX512BF16__
    transform_filters_bf16, convolve_tiles_bf16, correlate_tiles_bf16,
#endif
#ifdef __AMX_BF16__
    correlate_bf16,
#endif
};

/* Runs calls one after the other: each is the kernel's number, how many words follow, and these. */
void run(const int64_t *calls, int64_t num_words) {
    for (const int64_t *end = calls + num_words; calls < end; calls += 2 + calls[1]) kernels[calls[0]](calls + 2);
}
