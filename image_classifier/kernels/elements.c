/* Kernels for floats that stand anywhere: number by number, sums, other sizes of images, and steps of SGD. */
#include "kernels.h"
#include "simd.h"

/* One loop for each operation and kind of operand, so that the compiler gives each vectors. */
#define COMBINE_ROW(EXPRESSION)                                                                                        \
    if (right_step == 1 && left_step == 1 && out_step == 1)                                                            \
        for (int64_t i = 0; i < count; i++) {                                                                          \
            const float one = left[i], other = right[i];                                                               \
            out[i] = EXPRESSION;                                                                                       \
        }                                                                                                              \
    else if (right_step == 0 && left_step == 1 && out_step == 1)                                                       \
        for (int64_t i = 0; i < count; i++) {                                                                          \
            const float one = left[i], other = *right;                                                                 \
            out[i] = EXPRESSION;                                                                                       \
        }                                                                                                              \
    else                                                                                                               \
        for (int64_t i = 0; i < count; i++) {                                                                          \
            const float one = left[i * left_step], other = right[i * right_step];                                      \
            out[i * out_step] = EXPRESSION;                                                                            \
        }

static void combine_row(const struct combine *a, float *out, const float *left, const float *right) {
    const int64_t count = a->sizes[3], out_step = a->out_strides[3], left_step = a->left_strides[3];
    const int64_t right_step = a->right ? a->right_strides[3] : 0;
    const float factor = (float)a->factor;
    switch (a->operation) {
        case ADD:
            COMBINE_ROW(__builtin_fmaf(factor, other, one)) break;
        case SUBTRACT:
            COMBINE_ROW(__builtin_fmaf(-factor, other, one)) break;
        case MULTIPLY:
            COMBINE_ROW(one * other) break;
        case DIVIDE:
            COMBINE_ROW(one / other) break;
    }
}

void combine(const struct combine *a) {
    const float number = (float)a->number;
    for (int64_t i = 0; i < a->sizes[0]; i++)
        for (int64_t j = 0; j < a->sizes[1]; j++)
            for (int64_t k = 0; k < a->sizes[2]; k++) {
                const int64_t *o = a->out_strides, *l = a->left_strides, *r = a->right_strides;
                combine_row(a, a->out + i * o[0] + j * o[1] + k * o[2], a->left + i * l[0] + j * l[1] + k * l[2],
                            a->right ? a->right + i * r[0] + j * r[1] + k * r[2] : &number);
            }
}

void reduce(const struct reduce *a) {
    for (int64_t m = 0; m < a->rows; m++) {
        float *restrict out = a->out + m * a->columns;
        const float *restrict values = a->values + m * a->depth * a->columns;
        memcpy(out, values, (size_t)a->columns * 4);
        for (int64_t k = 1; k < a->depth; k++) {
            values += a->columns;
            if (a->takes_greatest)
                for (int64_t n = 0; n < a->columns; n++)
                    out[n] = values[n] > out[n] || values[n] != values[n] ? values[n] : out[n];
            else
                for (int64_t n = 0; n < a->columns; n++) out[n] += values[n];
        }
    }
}

void norm(const struct norm *a) {
    double sums[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= a->count; i += LANES)
        for (int j = 0; j < LANES; j++) {
            const double value = a->values[i + j];
            sums[j] = __builtin_fma(value, value, sums[j]);
        }
    for (; i < a->count; i++) sums[0] = __builtin_fma(a->values[i], a->values[i], sums[0]);
    for (int step = LANES / 2; step; step /= 2)
        for (int j = 0; j < step; j++) sums[j] += sums[j + step];
    *a->out = (float)__builtin_sqrt(sums[0]);
}

/* From which pixels of a line a pixel of the scaled line comes, and their weights: those of a triangle, which is wider
 * where the line becomes shorter. */
typedef struct {
    int64_t first, count;
} source;

INLINE int64_t count_sources(int64_t from, int64_t to) { return (from > to ? 2 * ((from + to - 1) / to) : 2) + 2; }

static source find_sources(int64_t place, int64_t from, int64_t to, float *weights) {
    const double scale = (double)from / (double)to, reach = scale > 1.0 ? scale : 1.0;
    const double centre = scale * ((double)place + 0.5);
    int64_t first = (int64_t)(centre - reach + 0.5), end = (int64_t)(centre + reach + 0.5);
    if (centre - reach + 0.5 < 0.0) first = 0;
    if (end > from) end = from;
    double sum = 0.0;
    for (int pass = 0; pass < 2; pass++)
        for (int64_t i = first; i < end; i++) {
            const double distance = ((double)i - centre + 0.5) / reach;
            const double weight = 1.0 - (distance < 0.0 ? -distance : distance);
            if (pass == 0)
                sum += weight > 0.0 ? weight : 0.0;
            else
                weights[i - first] = (float)((weight > 0.0 ? weight : 0.0) / sum);
        }
    return (source){first, end - first};
}

int64_t resize_scratch(const struct resize *a) {
    const int64_t down = count_sources(a->height, a->out_height), across = count_sources(a->width, a->out_width);
    const int64_t num_floats = a->width * a->channels * (a->height + 1) + down * a->out_height + across * a->out_width;
    return (a->out_height + a->out_width) * (int64_t)sizeof(source) + num_floats * 4;
}

void resize(const struct resize *a) {
    const int64_t channels = a->channels, row = a->width * channels, *strides = a->image_strides;
    const int64_t down = count_sources(a->height, a->out_height), across = count_sources(a->width, a->out_width);
    source *rows = a->scratch, *columns = rows + a->out_height;
    float *of_rows = (float *)(columns + a->out_width), *of_columns = of_rows + down * a->out_height;
    float *restrict image = of_columns + across * a->out_width, *restrict line = image + row * a->height;
    float *out = a->out;
    for (int64_t y = 0; y < a->out_height; y++) rows[y] = find_sources(y, a->height, a->out_height, of_rows + y * down);
    for (int64_t x = 0; x < a->out_width; x++)
        columns[x] = find_sources(x, a->width, a->out_width, of_columns + x * across);
    for (int64_t n = 0; n < a->num_images; n++) {
        for (int64_t y = 0; y < a->height; y++)
            for (int64_t x = 0; x < a->width; x++)
                for (int64_t c = 0; c < channels; c++)
                    image[y * row + x * channels + c] =
                        a->images[n * strides[0] + c * strides[1] + y * strides[2] + x * strides[3]];
        for (int64_t y = 0; y < a->out_height; y++) {
            memset(line, 0, (size_t)row * 4);
            for (int64_t k = 0; k < rows[y].count; k++) {
                const float weight = of_rows[y * down + k], *from = image + (rows[y].first + k) * row;
                for (int64_t i = 0; i < row; i++) line[i] = __builtin_fmaf(weight, from[i], line[i]);
            }
            for (int64_t x = 0; x < a->out_width; x++, out += channels)
                for (int64_t c = 0; c < channels; c++) {
                    float sum = 0.0f;
                    for (int64_t k = 0; k < columns[x].count; k++)
                        sum = __builtin_fmaf(of_columns[x * across + k], line[(columns[x].first + k) * channels + c],
                                             sum);
                    out[c] = sum;
                }
        }
    }
}

int64_t batch_norm_inference_scratch(const struct batch_norm_inference *a) { return a->channels * 2 * 4; }

void batch_norm_inference(const struct batch_norm_inference *a) {
    const int64_t channels = a->channels;
    float *restrict factors = a->scratch, *restrict summands = factors + channels;
    for (int64_t c = 0; c < channels; c++) {
        const double factor = a->weight[c] / __builtin_sqrt(a->variance[c] + a->epsilon);
        factors[c] = (float)factor, summands[c] = (float)(a->bias[c] - a->mean[c] * factor);
    }
    for (int64_t p = 0; p < a->num_pixels; p++) {
        float *restrict out = a->out + p * channels;
        const float *restrict values = a->values + p * channels;
        for (int64_t c = 0; c < channels; c++) out[c] = __builtin_fmaf(values[c], factors[c], summands[c]);
    }
}

void sgd(const struct sgd *a) {
    const float rate = (float)a->learning_rate, factor = (float)a->factor, decay = (float)a->weight_decay;
    for (int64_t i = 0; i < a->count; i += LANES) {
        const int64_t some = a->count - i;
        const vec before = load_some(a->parameter + i, some);
        vec step = scale_add(decay, before, load_some(a->gradient + i, some));
        if (a->momentum) {
            const vec momentum = scale_add(factor, load_some(a->momentum + i, some), step);
            store_some(a->momentum + i, momentum, some);
            step = a->is_nesterov ? scale_add(factor, momentum, step) : momentum;
        }
        store_some(a->parameter + i, scale_add(-rate, step, before), some);
    }
}
