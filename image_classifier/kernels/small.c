/* Kernels for steps of a few images, where torch takes most of the time to find out what to do. */
#include "kernels.h"
#include "simd.h"

enum {
    OUTPUTS_AT_ONCE = 6, /* of a convolution's micro-kernel */
#if defined(__AVX512F__)
    GRADIENTS_AT_ONCE = 4, /* output channels, and taps, of the micro-kernel of its filters' gradient */
    TAPS_AT_ONCE = 5
#else
    GRADIENTS_AT_ONCE = 2,
    TAPS_AT_ONCE = 3
#endif
};

/* Copies an image's planes to ones with `padding` zeros around them, whose rows are `pitch` apart. */
static void pack_planes(float *to, const float *from, const int64_t *strides, int64_t channels, int64_t height,
                        int64_t width, int64_t padding, int64_t pitch, int64_t plane) {
    memset(to, 0, (size_t)(channels * plane) * 4);
    for (int64_t c = 0; c < channels; c++)
        for (int64_t y = 0; y < height; y++) {
            float *row = to + c * plane + (y + padding) * pitch + padding;
            const float *source = from + c * strides[1] + y * strides[2];
            if (strides[3] == 1)
                memcpy(row, source, (size_t)width * 4);
            else
                for (int64_t x = 0; x < width; x++) row[x] = source[x * strides[3]];
        }
}

/* The micro-kernel: for some output channels and `wide` vectors of pixels, bias plus the sum of filter times pixel. */
INLINE void convolve_pixels(float *out, int64_t out_plane, const float *image, int64_t plane, int64_t pitch,
                            const float *filters, const float *bias, int64_t channels, int64_t taps, const int outputs,
                            const int wide) {
    vec sums[OUTPUTS_AT_ONCE][WIDE];
    UNROLL for (int o = 0; o < outputs; o++) UNROLL for (int i = 0; i < wide; i++) sums[o][i] = splat(bias[o]);
    for (int64_t c = 0; c < channels; c++)
        for (int64_t ky = 0; ky < taps; ky++) {
            const float *row = image + c * plane + ky * pitch;
            for (int64_t kx = 0; kx < taps; kx++, row++, filters += outputs) {
                vec pixels[WIDE];
                UNROLL for (int i = 0; i < wide; i++) pixels[i] = load(row + i * LANES);
                UNROLL for (int o = 0; o < outputs; o++)
                    UNROLL for (int i = 0; i < wide; i++) sums[o][i] = scale_add(filters[o], pixels[i], sums[o][i]);
            }
        }
    UNROLL for (int o = 0; o < outputs; o++)
        UNROLL for (int i = 0; i < wide; i++) store(out + o * out_plane + i * LANES, sums[o][i]);
}

INLINE void convolve_row(float *out, int64_t out_plane, const float *image, int64_t plane, int64_t pitch,
                         const float *filters, const float *bias, int64_t channels, int64_t taps, int64_t vectors,
                         const int outputs) {
    int64_t i = 0;
    for (; i + WIDE <= vectors; i += WIDE)
        convolve_pixels(out + i * LANES, out_plane, image + i * LANES, plane, pitch, filters, bias, channels, taps,
                        outputs, WIDE);
    for (; i < vectors; i++)
        convolve_pixels(out + i * LANES, out_plane, image + i * LANES, plane, pitch, filters, bias, channels, taps,
                        outputs, 1);
}

/* Sizes of a convolution whose images are packed: all output pixels of an image are computed as one row, with those
 * between its rows, which are thrown away. */
typedef struct {
    int64_t pitch, plane, height, width, vectors;
} packed_sizes;

INLINE packed_sizes plan_packing(int64_t height, int64_t width, int64_t taps, int64_t padding) {
    packed_sizes sizes = {.pitch = width + 2 * padding};
    sizes.plane = (height + 2 * padding) * sizes.pitch;
    sizes.height = height + 2 * padding - taps + 1;
    sizes.width = sizes.pitch - taps + 1;
    sizes.vectors = round_up((sizes.height - 1) * sizes.pitch + sizes.width) / LANES;
    return sizes;
}

int64_t convolve_scratch(const struct convolve *a) {
    const packed_sizes sizes = plan_packing(a->height, a->width, a->taps, a->padding);
    const int64_t filters = a->outputs * (a->channels * a->taps * a->taps + 1);
    const int64_t planes = a->channels * sizes.plane + (WIDE + 1) * LANES + a->taps;
    return (filters + planes + OUTPUTS_AT_ONCE * sizes.vectors * LANES) * 4;
}

void convolve(const struct convolve *a) {
    const int64_t channels = a->channels, outputs = a->outputs, taps = a->taps, filter = channels * taps * taps;
    const int64_t *strides = a->filter_strides;
    const packed_sizes sizes = plan_packing(a->height, a->width, taps, a->padding);
    const int64_t out_plane = sizes.vectors * LANES, behind = (WIDE + 1) * LANES + taps;
    float *packed = a->scratch, *biases = packed + filter * outputs, *planes = biases + outputs;
    float *rows = planes + channels * sizes.plane + behind;

    for (int64_t first = 0; first < outputs; first += OUTPUTS_AT_ONCE) {
        const int64_t some = outputs - first < OUTPUTS_AT_ONCE ? outputs - first : OUTPUTS_AT_ONCE;
        float *to = packed + first * filter;
        for (int64_t c = 0; c < channels; c++)
            for (int64_t ky = 0; ky < taps; ky++)
                for (int64_t kx = 0; kx < taps; kx++)
                    for (int64_t o = first; o < first + some; o++)
                        *to++ = a->filters[a->first_weight + o * strides[0] + c * strides[1] + ky * strides[2] +
                                           kx * strides[3]];
    }
    for (int64_t o = 0; o < outputs; o++) biases[o] = a->bias ? a->bias[o] : 0.0f;
    memset(planes + channels * sizes.plane, 0, (size_t)behind * 4);
    for (int64_t n = 0; n < a->num_images; n++) {
        pack_planes(planes, a->images + n * a->image_strides[0], a->image_strides, channels, a->height, a->width,
                    a->padding, sizes.pitch, sizes.plane);
        for (int64_t first = 0; first < outputs; first += OUTPUTS_AT_ONCE) {
            const float *filters = packed + first * filter, *bias = biases + first;
            const int64_t some = outputs - first < OUTPUTS_AT_ONCE ? outputs - first : OUTPUTS_AT_ONCE;
            switch (some) {
#define CASE(count)                                                                                                    \
    case count:                                                                                                        \
        convolve_row(rows, out_plane, planes, sizes.plane, sizes.pitch, filters, bias, channels, taps, sizes.vectors,  \
                     count);                                                                                           \
        break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
            }
            for (int64_t o = 0; o < some; o++)
                for (int64_t y = 0; y < sizes.height; y++)
                    memcpy(a->out + ((n * outputs + first + o) * sizes.height + y) * sizes.width,
                           rows + o * out_plane + y * sizes.pitch, (size_t)sizes.width * 4);
        }
    }
}

/* The micro-kernel: for some output channels and taps of a row, the sum over all pixels of image times gradient. */
INLINE void correlate_taps(float *out, const int64_t *strides, const float *planes, int64_t image,
                           const float *gradients, int64_t gradient_plane, int64_t gradient_image, int64_t num_images,
                           const int outputs, const int taps) {
    vec sums[GRADIENTS_AT_ONCE][TAPS_AT_ONCE];
    UNROLL for (int o = 0; o < outputs; o++) UNROLL for (int k = 0; k < taps; k++) sums[o][k] = (vec){0};
    for (int64_t n = 0; n < num_images; n++, planes += image, gradients += gradient_image)
        for (int64_t q = 0; q < gradient_plane; q += LANES) {
            vec some[GRADIENTS_AT_ONCE];
            UNROLL for (int o = 0; o < outputs; o++) some[o] = load(gradients + o * gradient_plane + q);
            UNROLL for (int k = 0; k < taps; k++) {
                const vec pixels = load(planes + q + k);
                UNROLL for (int o = 0; o < outputs; o++) sums[o][k] = multiply_add(some[o], pixels, sums[o][k]);
            }
        }
    UNROLL for (int o = 0; o < outputs; o++)
        UNROLL for (int k = 0; k < taps; k++) out[o * strides[0] + k * strides[3]] = sum_lanes(sums[o][k]);
}

INLINE int64_t count_behind(const packed_sizes *sizes) { return sizes->pitch + 2 * LANES; }

int64_t convolve_filter_gradient_scratch(const struct convolve_filter_gradient *a) {
    const packed_sizes sizes = plan_packing(a->height, a->width, a->taps, a->padding);
    const int64_t image = a->channels * sizes.plane + a->outputs * sizes.vectors * LANES;
    return (a->num_images * image + count_behind(&sizes)) * 4;
}

void convolve_filter_gradient(const struct convolve_filter_gradient *a) {
    const int64_t num_images = a->num_images, channels = a->channels, outputs = a->outputs, taps = a->taps;
    const int64_t *strides = a->filter_strides;
    const packed_sizes sizes = plan_packing(a->height, a->width, taps, a->padding);
    const int64_t plane = sizes.plane, gradient_plane = sizes.vectors * LANES;
    float *planes = a->scratch, *gradients = planes + num_images * channels * plane + count_behind(&sizes);

    memset(planes + num_images * channels * plane, 0, (size_t)count_behind(&sizes) * 4);
    for (int64_t n = 0; n < num_images; n++) {
        pack_planes(planes + n * channels * plane, a->images + n * a->image_strides[0], a->image_strides, channels,
                    a->height, a->width, a->padding, sizes.pitch, plane);
        pack_planes(gradients + n * outputs * gradient_plane, a->gradient + n * a->gradient_strides[0],
                    a->gradient_strides, outputs, sizes.height, sizes.width, 0, sizes.pitch, gradient_plane);
    }
    for (int64_t o = 0; a->of_filters && o < outputs;) {
        const int64_t left = outputs - o, some = left >= GRADIENTS_AT_ONCE ? GRADIENTS_AT_ONCE : left >= 2 ? 2 : 1;
        for (int64_t c = 0; c < channels; c++)
            for (int64_t ky = 0; ky < taps; ky++)
                for (int64_t kx = 0; kx < taps; kx += TAPS_AT_ONCE) {
                    float *to = a->of_filters + o * strides[0] + c * strides[1] + ky * strides[2] + kx * strides[3];
                    const float *from = planes + c * plane + ky * sizes.pitch + kx;
                    const float *some_gradients = gradients + o * gradient_plane;
                    switch (some * 8 + (taps - kx < TAPS_AT_ONCE ? taps - kx : TAPS_AT_ONCE)) {
#define CASE(count, taps)                                                                                              \
    case count * 8 + taps:                                                                                             \
        correlate_taps(to, strides, from, channels *plane, some_gradients, gradient_plane, outputs *gradient_plane,    \
                       num_images, count, taps);                                                                       \
        break;
#if defined(__AVX512F__)
#define CASES(count) CASE(count, 1) CASE(count, 2) CASE(count, 3) CASE(count, 4) CASE(count, 5)
                        CASES(1) CASES(2) CASES(4)
#else
#define CASES(count) CASE(count, 1) CASE(count, 2) CASE(count, 3)
                        CASES(1) CASES(2)
#endif
#undef CASES
#undef CASE
                    }
                }
        o += some;
    }
    for (int64_t o = 0; a->of_bias && o < outputs; o++) {
        vec sum = {0};
        for (int64_t n = 0; n < num_images; n++)
            for (int64_t q = 0; q < gradient_plane; q += LANES)
                sum += load(gradients + (n * outputs + o) * gradient_plane + q);
        a->of_bias[o] = sum_lanes(sum);
    }
}

void pool_planes(const struct pool_planes *a) {
    const int64_t height = a->height, width = a->width, out_height = height / 2, out_width = width / 2;
    float *restrict out = a->out;
    uint8_t *restrict indices = a->indices;
    for (int64_t p = 0; p < a->num_planes; p++)
        for (int64_t y = 0; y < out_height; y++, out += out_width, indices += out_width) {
            const float *upper = a->images + (p * height + 2 * y) * width, *lower = upper + width;
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

void pool_planes_gradient(const struct pool_planes_gradient *a) {
    const int64_t height = a->height, width = a->width, *strides = a->gradient_strides;
    float *out = a->out;
    const uint8_t *indices = a->indices;
    if (height % 2 || width % 2) memset(out, 0, (size_t)(a->num_images * a->channels * height * width) * 4);
    for (int64_t n = 0; n < a->num_images; n++)
        for (int64_t c = 0; c < a->channels; c++, out += height * width)
            for (int64_t y = 0; y < height / 2; y++, indices += width / 2) {
                const float *gradient = a->gradient + n * strides[0] + c * strides[1] + y * strides[2];
                float *upper = out + 2 * y * width, *lower = upper + width;
                if (strides[3] == 1)
                    unpool_rows(upper, lower, gradient, indices, width / 2, 1);
                else
                    unpool_rows(upper, lower, gradient, indices, width / 2, strides[3]);
            }
}

void relu(const struct relu *a) {
    float *restrict out = a->out;
    const float *restrict values = a->values;
    for (int64_t i = 0; i < a->count; i++) out[i] = values[i] > 0.0f || values[i] != values[i] ? values[i] : 0.0f;
}

void relu_gradient(const struct relu_gradient *a) {
    float *restrict out = a->out;
    const float *restrict gradient = a->gradient, *restrict values = a->values;
    for (int64_t i = 0; i < a->count; i++) out[i] = values[i] <= 0.0f ? 0.0f : gradient[i];
}

/* The micro-kernel: some rows and `wide` vectors of columns, or a part of a vector. */
INLINE void multiply_block(float *out, int64_t columns, const float *left, int64_t left_row, int64_t left_column,
                           const float *right, int64_t right_row, const float *bias, int64_t depth, int64_t count,
                           const int rows, const int wide) {
    vec sums[4][WIDE];
    UNROLL for (int i = 0; i < wide; i++) {
        const vec start = bias ? load_some(bias + i * LANES, count) : (vec){0};
        UNROLL for (int r = 0; r < rows; r++) sums[r][i] = start;
    }
    for (int64_t k = 0; k < depth; k++)
        UNROLL for (int i = 0; i < wide; i++) {
            const float *from = right + k * right_row + i * LANES;
            const vec values = count < LANES ? load_some(from, count) : load(from);
            UNROLL for (int r = 0; r < rows; r++)
                sums[r][i] = scale_add(left[r * left_row + k * left_column], values, sums[r][i]);
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < wide; i++) store_some(out + r * columns + i * LANES, sums[r][i], count);
}

void matmul(const struct matmul *a) {
    const int64_t columns = a->columns;
    for (int64_t m = 0; m < a->rows;) {
        const int64_t some = a->rows - m >= 4 ? 4 : 1;
        for (int64_t n = 0; n < columns;) {
            const int64_t left = columns - n, wide = left >= WIDE * LANES ? WIDE : 1;
            const int64_t count = left < LANES ? left : LANES;
#define BLOCK(rows, wide)                                                                                              \
    multiply_block(a->out + m * columns + n, columns, a->left + m * a->left_row, a->left_row, a->left_column,          \
                   a->right + n, a->right_row, a->bias ? a->bias + n : 0, a->depth, count, rows, wide)
            if (some == 4 && wide == WIDE)
                BLOCK(4, WIDE);
            else if (some == 4)
                BLOCK(4, 1);
            else if (wide == WIDE)
                BLOCK(1, WIDE);
            else
                BLOCK(1, 1);
#undef BLOCK
            n += wide * LANES;
        }
        m += some;
    }
}

/* The micro-kernel: products of some rows with `wide` columns. */
INLINE void multiply_dots(float *out, int64_t columns, const float *left, int64_t left_row, const float *right,
                          int64_t right_column, const float *bias, int64_t depth, const int rows, const int wide) {
    vec sums[4][WIDE];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int i = 0; i < wide; i++) sums[r][i] = (vec){0};
    const int64_t whole = depth / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES)
        UNROLL for (int i = 0; i < wide; i++) {
            const vec values = load(right + i * right_column + k);
            UNROLL for (int r = 0; r < rows; r++)
                sums[r][i] = multiply_add(load(left + r * left_row + k), values, sums[r][i]);
        }
    if (whole < depth)
        UNROLL for (int i = 0; i < wide; i++) {
            const vec values = load_some(right + i * right_column + whole, depth - whole);
            UNROLL for (int r = 0; r < rows; r++)
                sums[r][i] =
                    multiply_add(load_some(left + r * left_row + whole, depth - whole), values, sums[r][i]);
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < wide; i++)
            out[r * columns + i] = sum_lanes(sums[r][i]) + (bias ? bias[i] : 0.0f);
}

void matmul_transposed(const struct matmul_transposed *a) {
    const int64_t columns = a->columns;
    for (int64_t m = 0; m < a->rows;) {
        const int64_t some = a->rows - m >= 4 ? 4 : 1;
        for (int64_t n = 0; n < columns;) {
            const int64_t wide = columns - n >= WIDE ? WIDE : 1;
#define BLOCK(rows, wide)                                                                                              \
    multiply_dots(a->out + m * columns + n, columns, a->left + m * a->left_row, a->left_row,                           \
                  a->right + n * a->right_column, a->right_column, a->bias ? a->bias + n : 0, a->depth, rows, wide)
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

void sum_rows(const struct sum_rows *a) {
    float *restrict out = a->out;
    memcpy(out, a->values, (size_t)a->columns * 4);
    for (int64_t m = 1; m < a->rows; m++)
        for (int64_t n = 0; n < a->columns; n++) out[n] += a->values[m * a->columns + n];
}

void copy(const struct copy *a) { memcpy(a->out, a->values, (size_t)a->num_bytes); }

void convert_bytes(const struct convert_bytes *a) {
    float *restrict out = a->out;
    const uint8_t *restrict values = a->values;
    for (int64_t i = 0; i < a->count; i++) out[i] = values[i];
}

void shift_channels(const struct shift_channels *a) {
    float *restrict out = a->out;
    const float *restrict values = a->values;
    for (int64_t n = 0; n < a->num_images; n++)
        for (int64_t c = 0; c < a->channels; c++, out += a->num_pixels, values += a->num_pixels) {
            const float number = a->numbers[c];
            if (a->divides)
                for (int64_t i = 0; i < a->num_pixels; i++) out[i] = values[i] / number;
            else
                for (int64_t i = 0; i < a->num_pixels; i++) out[i] = values[i] - number;
        }
}

/* e to the power of x, to the last bit but one: a power of two, and a series for what is left. */
static float compute_exponential(float x) {
    if (!(x >= -103.9f)) return x < -103.9f ? 0.0f : x;
    if (x > 88.8f) return 2.0f * FLT_MAX;
    const double power = (double)x * 1.4426950408889634, whole = (double)(int64_t)(power + (x < 0 ? -0.5 : 0.5));
    const double rest = (power - whole) * 0.6931471805599453;
    double sum = 1.0;
    for (int n = 11; n > 0; n--) sum = 1.0 + rest / n * sum;
    const union {
        uint64_t bits;
        double value;
    } scale = {(uint64_t)((int64_t)whole + 1023) << 52};
    return (float)(sum * scale.value);
}

/* The natural logarithm of a number of 1 or more, likewise: its exponent, and a series for what is left near 1. */
static float compute_logarithm(float x) {
    if (!(x <= FLT_MAX)) return x;
    union {
        uint64_t bits;
        double value;
    } part = {.value = x};
    int64_t exponent = (int64_t)(part.bits >> 52) - 1023;
    part.bits = (part.bits & 0xfffffffffffff) | (1023ULL << 52);
    if (part.value > 1.4142135623730951) part.value *= 0.5, exponent++;
    const double ratio = (part.value - 1.0) / (part.value + 1.0), square = ratio * ratio;
    double sum = 0.0;
    for (int n = 17; n > 0; n -= 2) sum = 1.0 / n + square * sum;
    return (float)(2.0 * ratio * sum + (double)exponent * 0.6931471805599453);
}

static float find_greatest(const float *values, int64_t count) {
    float most = values[0];
    for (int64_t n = 1; n < count; n++) most = values[n] > most || values[n] != values[n] ? values[n] : most;
    return most;
}

void log_softmax(const struct log_softmax *a) {
    for (int64_t m = 0; m < a->rows; m++) {
        float *out = a->out + m * a->columns, sum = 0.0f;
        const float *values = a->values + m * a->columns;
        const float most = find_greatest(values, a->columns);
        for (int64_t n = 0; n < a->columns; n++) sum += compute_exponential(values[n] - most);
        const float log_sum = most + compute_logarithm(sum);
        for (int64_t n = 0; n < a->columns; n++) out[n] = values[n] - log_sum;
    }
}

void softmax(const struct softmax *a) {
    for (int64_t m = 0; m < a->rows; m++) {
        float *out = a->out + m * a->columns, sum = 0.0f;
        const float *values = a->values + m * a->columns;
        const float most = find_greatest(values, a->columns);
        for (int64_t n = 0; n < a->columns; n++) sum += out[n] = compute_exponential(values[n] - most);
        for (int64_t n = 0; n < a->columns; n++) out[n] /= sum;
    }
}

void log_softmax_gradient(const struct log_softmax_gradient *a) {
    for (int64_t m = 0; m < a->rows; m++) {
        const int64_t row = m * a->columns;
        const float *gradient = a->gradient + row, *values = a->values + row;
        float *out = a->out + row, sum = 0.0f;
        for (int64_t n = 0; n < a->columns; n++) sum += gradient[n];
        for (int64_t n = 0; n < a->columns; n++) out[n] = gradient[n] - compute_exponential(values[n]) * sum;
    }
}

void nll_loss(const struct nll_loss *a) {
    float sum = 0.0f;
    for (int64_t m = 0; m < a->rows; m++) {
        const int64_t label = a->labels[m];
        sum -= label >= 0 && label < a->columns ? a->values[m * a->columns + label] : __builtin_nanf("");
    }
    *a->total = (float)a->rows;
    *a->loss = sum / (float)a->rows;
}

void nll_loss_gradient(const struct nll_loss_gradient *a) {
    memset(a->out, 0, (size_t)(a->rows * a->columns) * 4);
    for (int64_t m = 0; m < a->rows; m++) {
        const int64_t label = a->labels[m];
        if (label >= 0 && label < a->columns) a->out[m * a->columns + label] = -*a->gradient / (float)a->rows;
    }
}

void argmax(const struct argmax *a) {
    for (int64_t m = 0; m < a->rows; m++) {
        const float *values = a->values + m * a->columns;
        int64_t which = 0;
        for (int64_t n = 1; n < a->columns && values[which] == values[which]; n++)
            if (values[n] > values[which] || values[n] != values[n]) which = n;
        a->out[m] = which;
    }
}

void equal(const struct equal *a) {
    for (int64_t i = 0; i < a->count; i++) a->out[i] = a->left[i] == a->right[i];
}

void count_true(const struct count_true *a) {
    int64_t sum = 0;
    for (int64_t i = 0; i < a->count; i++) sum += a->values[i];
    *a->out = sum;
}

/* Runs kernels one after the other. */
void run(const struct call *calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) calls[i].kernel(calls[i].arguments);
}
