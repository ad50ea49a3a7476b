/* Kernels of steps of many images, for one type of floats: kernels.c includes this once for each, with `real`, `widen`,
 * `narrow` and `NAME`. Channels stand next to each other; the work is split over threads. */

/* 0 out, 1 indices, 2 images [N, H, W, C], 3 N, 4 H, 5 W, 6 C, 7 threads */
static void NAME(pool)(const int64_t *a) {
    const int64_t height = a[4], width = a[5], channels = a[6], out_height = height / 2, out_width = width / 2;
#pragma omp parallel for num_threads((int)a[7]) schedule(static)
    for (int64_t row = 0; row < a[3] * out_height; row++) {
        const int64_t start = row / out_height * height + row % out_height * 2;
        for (int64_t x = 0; x < out_width; x++) {
            const real *restrict first = (const real *)a[2] + (start * width + 2 * x) * channels;
            const real *restrict second = first + channels, *restrict third = first + width * channels;
            const real *restrict fourth = third + channels;
            real *restrict out = (real *)a[0] + (row * out_width + x) * channels;
            uint8_t *restrict indices = (uint8_t *)a[1] + (row * out_width + x) * channels;
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

/* 0 gradient of the images, 1 indices, 2 gradient of what was pooled, 3 N, 4 H, 5 W, 6 C, 7 threads */
static void NAME(unpool)(const int64_t *a) {
    const int64_t height = a[4], width = a[5], channels = a[6], out_height = height / 2, out_width = width / 2;
#pragma omp parallel for num_threads((int)a[7]) schedule(static)
    for (int64_t n = 0; n < a[3]; n++) {
        real *image = (real *)a[0] + n * height * width * channels;
        if (height % 2) memset(image + (height - 1) * width * channels, 0, (size_t)(width * channels) * sizeof(real));
        for (int64_t y = 0; y < out_height; y++) {
            for (int64_t x = 0; x < out_width; x++) {
                const int64_t from = ((n * out_height + y) * out_width + x) * channels;
                const real *restrict gradient = (const real *)a[2] + from;
                const uint8_t *restrict indices = (const uint8_t *)a[1] + from;
                real *restrict first = image + (2 * y * width + 2 * x) * channels;
                real *restrict second = first + channels, *restrict third = first + width * channels;
                real *restrict fourth = third + channels;
#pragma omp simd
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

/* 0 gradient of the input, 1 gradient of the output, 2 the input, 3 count, 4 threads */
static void NAME(gelu_gradient)(const int64_t *a) {
    real *restrict out = (real *)a[0];
    const real *restrict gradient = (const real *)a[1], *restrict in = (const real *)a[2];
#pragma omp parallel for num_threads((int)a[4]) schedule(static)
    for (int64_t i = 0; i < a[3]; i++)
        out[i] = narrow(widen(gradient[i]) * compute_slope(widen(in[i])));
}

/* Sums of a[1] and of a[1] times (a[2] minus the mean a[4]), of each channel, by thread.
 * 0 sums (doubles) [threads, 2, C], 1 and 2 [P, C], 3 scratch (floats) [threads, 2, C], 4 mean [C], 5 P, 6 C,
 * 7 threads */
static void NAME(sum_channels)(const int64_t *a) {
    const int64_t pixels = a[5], channels = a[6], threads = a[7], part = (pixels + threads - 1) / threads;
    const float *restrict mean = (const float *)a[4];
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t t = 0; t < threads; t++) {
        double *restrict sums = (double *)a[0] + t * 2 * channels;
        float *restrict some = (float *)a[3] + t * 2 * channels, *restrict products = some + channels;
        const int64_t end = (t + 1) * part < pixels ? (t + 1) * part : pixels;
        memset(sums, 0, (size_t)channels * 2 * sizeof(double));
        for (int64_t start = t * part; start < end; start += ROWS) {
            memset(some, 0, (size_t)channels * 2 * sizeof(float));
            for (int64_t p = start; p < start + ROWS && p < end; p++) {
                const real *restrict left = (const real *)a[1] + p * channels;
                const real *restrict right = (const real *)a[2] + p * channels;
                for (int64_t c = 0; c < channels; c++) {
                    const float value = widen(left[c]);
                    some[c] += value;
                    products[c] += value * (widen(right[c]) - mean[c]);
                }
            }
            for (int64_t c = 0; c < 2 * channels; c++) sums[c] += some[c];
        }
    }
}

/* 0 out [P, C], 1 in, 2 factors [C], 3 summands [C], 4 P, 5 C, 6 threads, 7 further in [P, C] or 0, 8 its factors */
static void NAME(scale_channels)(const int64_t *a) {
    const int64_t channels = a[5];
    const float *restrict factors = (const float *)a[2], *restrict summands = (const float *)a[3];
    const float *restrict others = (const float *)a[8];
#pragma omp parallel for num_threads((int)a[6]) schedule(static)
    for (int64_t p = 0; p < a[4]; p++) {
        real *restrict out = (real *)a[0] + p * channels;
        const real *restrict in = (const real *)a[1] + p * channels;
        const real *restrict further = (const real *)a[7] + p * channels;
        if (a[7])
            for (int64_t c = 0; c < channels; c++)
                out[c] = narrow(widen(in[c]) * factors[c] + widen(further[c]) * others[c] + summands[c]);
        else
            for (int64_t c = 0; c < channels; c++) out[c] = narrow(widen(in[c]) * factors[c] + summands[c]);
    }
}
