/* Kernels for one type of numbers: large.c includes this once for each, with `real`, `widen`, `narrow`, `compute_slope`
 * and `NAME`. */

void NAME(max_pool)(const struct max_pool *a) {
    const int64_t height = a->height, width = a->width, channels = a->channels;
    const int64_t out_height = height / 2, out_width = width / 2;
    for (int64_t row = 0; row < a->num_images * out_height; row++) {
        const int64_t start = row / out_height * height + row % out_height * 2;
        for (int64_t x = 0; x < out_width; x++) {
            const real *restrict first = (const real *)a->images + (start * width + 2 * x) * channels;
            const real *restrict second = first + channels, *restrict third = first + width * channels;
            const real *restrict fourth = third + channels;
            real *restrict out = (real *)a->out + (row * out_width + x) * channels;
            uint8_t *restrict indices = a->indices + (row * out_width + x) * channels;
            for (int64_t c = 0; c < channels; c++) {
                float best = widen(first[c]);
                uint8_t which = 0;
                const float rest[3] = {widen(second[c]), widen(third[c]), widen(fourth[c])};
                UNROLL for (uint8_t i = 0; i < 3; i++) {
                    const int better = rest[i] > best || rest[i] != rest[i];
                    best = better ? rest[i] : best;
                    which = better ? (uint8_t)(i + 1) : which;
                }
                out[c] = narrow(best);
                indices[c] = which;
            }
        }
    }
}

void NAME(max_pool_gradient)(const struct max_pool_gradient *a) {
    const int64_t height = a->height, width = a->width, channels = a->channels;
    const int64_t out_height = height / 2, out_width = width / 2;
    for (int64_t n = 0; n < a->num_images; n++) {
        real *image = (real *)a->out + n * height * width * channels;
        if (height % 2) memset(image + (height - 1) * width * channels, 0, (size_t)(width * channels) * sizeof(real));
        for (int64_t y = 0; y < out_height; y++) {
            for (int64_t x = 0; x < out_width; x++) {
                const int64_t from = ((n * out_height + y) * out_width + x) * channels;
                const real *restrict gradient = (const real *)a->gradient + from;
                const uint8_t *restrict indices = a->indices + from;
                real *restrict first = image + (2 * y * width + 2 * x) * channels;
                real *restrict second = first + channels, *restrict third = first + width * channels;
                real *restrict fourth = third + channels;
#pragma clang loop vectorize(assume_safety)
                for (int64_t c = 0; c < channels; c++) {
                    const real value = gradient[c];
                    const uint8_t which = indices[c];
                    first[c] = which == 0 ? value : 0;
                    second[c] = which == 1 ? value : 0;
                    third[c] = which == 2 ? value : 0;
                    fourth[c] = which == 3 ? value : 0;
                }
            }
            if (width % 2)
                for (int64_t row = 2 * y; row < 2 * y + 2; row++)
                    memset(image + (row * width + width - 1) * channels, 0, (size_t)channels * sizeof(real));
        }
    }
}

void NAME(gelu_gradient)(const struct gelu_gradient *a) {
    real *restrict out = a->out;
    const real *restrict gradient = a->gradient, *restrict values = a->values;
    for (int64_t i = 0; i < a->count; i++)
        out[i] = narrow(widen(gradient[i]) * compute_slope(widen(values[i])));
}

/* What batch norm needs of memory, for each channel. */
typedef struct {
    double *sums;                       /* of values, then of products */
    float *some, *factors, *summands, *others; /* some: such sums of ROWS pixels */
} NAME(norm_memory);

enum { NAME(NORM_BYTES) = 2 * sizeof(double) + 5 * sizeof(float) };

INLINE NAME(norm_memory) NAME(divide_memory)(void *scratch, int64_t channels) {
    double *sums = scratch;
    float *some = (float *)(sums + 2 * channels), *factors = some + 2 * channels;
    return (NAME(norm_memory)){sums, some, factors, factors + channels, factors + 2 * channels};
}

/* Sums, of each channel, of values and of their products with others less a number. */
INLINE void NAME(sum_channels)(const NAME(norm_memory) * memory, const real *values, const real *others,
                               const float *restrict less, int64_t num_pixels, int64_t channels) {
    double *restrict sums = memory->sums;
    float *restrict some = memory->some, *restrict products = some + channels;
    memset(sums, 0, (size_t)channels * 2 * sizeof(double));
    for (int64_t start = 0; start < num_pixels; start += ROWS) {
        memset(some, 0, (size_t)channels * 2 * sizeof(float));
        for (int64_t p = start; p < start + ROWS && p < num_pixels; p++) {
            const real *restrict left = values + p * channels, *restrict right = others + p * channels;
            for (int64_t c = 0; c < channels; c++) {
                const float value = widen(left[c]);
                some[c] += value;
                products[c] = __builtin_fmaf(value, widen(right[c]) - less[c], products[c]);
            }
        }
        for (int64_t c = 0; c < 2 * channels; c++) sums[c] += some[c];
    }
}

int64_t NAME(batch_norm_scratch)(const struct batch_norm *a) { return a->channels * NAME(NORM_BYTES); }

void NAME(batch_norm)(const struct batch_norm *a) {
    const int64_t num_pixels = a->num_pixels, channels = a->channels;
    const real *values = a->values;
    const NAME(norm_memory) memory = NAME(divide_memory)(a->scratch, channels);
    const float *restrict factors = memory.factors, *restrict summands = memory.summands;
    float *shift = memory.others; /* near the mean: little is lost by subtracting it */
    for (int64_t c = 0; c < channels; c++) shift[c] = widen(values[c]);
    NAME(sum_channels)(&memory, values, values, shift, num_pixels, channels);
    for (int64_t c = 0; c < channels; c++) {
        const double mean = memory.sums[c] / (double)num_pixels;
        const double difference = memory.sums[channels + c] / (double)num_pixels - mean * (mean - shift[c]);
        const double variance = difference < 0 ? 0 : difference;
        const double scale = 1 / __builtin_sqrt(variance + a->epsilon);
        const float unbiased = (float)(variance * ((double)num_pixels / (double)(num_pixels - 1)));
        const float kept = (float)(1 - a->momentum), momentum = (float)a->momentum;
        a->running_mean[c] = a->running_mean[c] * kept + momentum * (float)mean;
        a->running_variance[c] = a->running_variance[c] * kept + momentum * unbiased;
        a->mean[c] = (float)mean, a->scale[c] = (float)scale;
        memory.factors[c] = (float)(scale * a->weight[c]);
        memory.summands[c] = (float)(a->bias[c] - mean * (scale * a->weight[c]));
    }
    for (int64_t p = 0; p < num_pixels; p++) {
        real *restrict to = (real *)a->out + p * channels;
        const real *restrict from = values + p * channels;
        for (int64_t c = 0; c < channels; c++) to[c] = narrow(__builtin_fmaf(widen(from[c]), factors[c], summands[c]));
    }
}

int64_t NAME(batch_norm_gradient_scratch)(const struct batch_norm_gradient *a) {
    return a->channels * NAME(NORM_BYTES);
}

void NAME(batch_norm_gradient)(const struct batch_norm_gradient *a) {
    const int64_t num_pixels = a->num_pixels, channels = a->channels;
    const NAME(norm_memory) memory = NAME(divide_memory)(a->scratch, channels);
    const float *restrict factors = memory.factors, *restrict summands = memory.summands;
    const float *restrict slopes = memory.others;
    NAME(sum_channels)(&memory, a->gradient, a->values, a->mean, num_pixels, channels);
    for (int64_t c = 0; c < channels; c++) {
        const double of_bias = memory.sums[c], product = memory.sums[channels + c], scale = a->scale[c];
        const double slope = -product * (scale * scale * scale) * a->weight[c] / (double)num_pixels;
        const float factor = a->scale[c] * a->weight[c];
        memory.factors[c] = factor, memory.others[c] = (float)slope;
        memory.summands[c] = (float)(-(of_bias / (double)num_pixels) * factor - slope * a->mean[c]);
        a->of_weight[c] = (float)(product * scale), a->of_bias[c] = (float)of_bias;
    }
    if (!a->of_values) return;
    for (int64_t p = 0; p < num_pixels; p++) {
        real *restrict to = (real *)a->of_values + p * channels;
        const real *restrict gradient = (const real *)a->gradient + p * channels;
        const real *restrict values = (const real *)a->values + p * channels;
        for (int64_t c = 0; c < channels; c++) {
            const float summand = __builtin_fmaf(widen(values[c]), slopes[c], summands[c]);
            to[c] = narrow(__builtin_fmaf(widen(gradient[c]), factors[c], summand));
        }
    }
}
