/* 3x3 convolutions with stride 1 by Winograd's F(4x4, 3x3) (Lavin, Gray: Fast Algorithms for Convolutional Neural
 * Networks, 2016): a tile of 4 by 4 results takes 36 products for each pair of channels, where it took 144.
 *
 * A filter, and the 6 by 6 pixels that a tile's results come from, are read as polynomials in two variables and
 * evaluated at 6 by 6 points; there they are multiplied, as 36 products of matrices; the results are found from their
 * values again. The points are 0, +-0.6, +-1.5 and infinity: in floats of 16 bits their errors are smaller than those of
 * the usual 0, +-1, +-2.
 *
 * kernels.c includes this once for each type of floats. What is multiplied stands in words of 32 bits, which hold DEPTH
 * factors of as many products: one float, or two of 16 bits. */
#ifndef POINTS
#define POINTS 36
#define UNROLL_POINTS _Pragma("GCC unroll 36")
#define P 0.6f
#define Q 1.5f

enum {
    SIDE = 6,         /* of the pixels of a tile, and of the points */
    TILE = 4,         /* of its results */
    ROWS_AT_ONCE = 6, /* of a product that are kept in registers, WIDE vectors each */
    BLOCK = 48,       /* rows of words that are transformed at a time: they stay in a core's second cache */
    GAP = 16          /* words between rows, whose addresses would else share a few lines of the caches */
};

typedef void transform(vec *, int);

/* One after the other: pixels to points, gradients of results to points, points to results, filters to points, points
 * to gradients of filters; in place, on values that are `step` apart. */
INLINE void transform_pixels(vec *v, int step) {
    const vec a = v[0], b = v[step], c = v[2 * step], d = v[3 * step], e = v[4 * step], f = v[5 * step];
    const vec even_p = e - Q * Q * c, odd_p = P * d - P * Q * Q * b;
    const vec even_q = e - P * P * c, odd_q = Q * d - Q * P * P * b;
    v[0] = P * P * Q * Q * a - (P * P + Q * Q) * c + e;
    v[step] = even_p + odd_p, v[2 * step] = even_p - odd_p;
    v[3 * step] = even_q + odd_q, v[4 * step] = even_q - odd_q;
    v[5 * step] = P * P * Q * Q * b - (P * P + Q * Q) * d + f;
}

INLINE void transform_gradients(vec *v, int step) {
    const vec a = v[0], b = v[step], c = v[2 * step], d = v[3 * step];
    const vec even_p = a + P * P * c, odd_p = P * b + P * P * P * d;
    const vec even_q = a + Q * Q * c, odd_q = Q * b + Q * Q * Q * d;
    v[step] = even_p + odd_p, v[2 * step] = even_p - odd_p;
    v[3 * step] = even_q + odd_q, v[4 * step] = even_q - odd_q;
    v[5 * step] = d;
}

INLINE void transform_results(vec *v, int step) {
    const vec sum_p = v[step] + v[2 * step], difference_p = v[step] - v[2 * step];
    const vec sum_q = v[3 * step] + v[4 * step], difference_q = v[3 * step] - v[4 * step];
    v[0] = v[0] + sum_p + sum_q;
    v[step] = P * difference_p + Q * difference_q;
    v[2 * step] = P * P * sum_p + Q * Q * sum_q;
    v[3 * step] = P * P * P * difference_p + Q * Q * Q * difference_q + v[5 * step];
}

#define OF_ZERO (1 / (P * P * Q * Q))
#define OF_P (1 / (2 * P * P * (P * P - Q * Q)))
#define OF_Q (1 / (2 * Q * Q * (Q * Q - P * P)))

INLINE void transform_filter_line(vec *v, int step) {
    const vec a = v[0], b = v[step], c = v[2 * step];
    const vec even_p = OF_P * (a + P * P * c), odd_p = OF_P * P * b;
    const vec even_q = OF_Q * (a + Q * Q * c), odd_q = OF_Q * Q * b;
    v[0] = OF_ZERO * a;
    v[step] = even_p + odd_p, v[2 * step] = even_p - odd_p;
    v[3 * step] = even_q + odd_q, v[4 * step] = even_q - odd_q;
    v[5 * step] = c;
}

INLINE void transform_sums(vec *v, int step) {
    const vec sum_p = OF_P * (v[step] + v[2 * step]), difference_p = OF_P * P * (v[step] - v[2 * step]);
    const vec sum_q = OF_Q * (v[3 * step] + v[4 * step]), difference_q = OF_Q * Q * (v[3 * step] - v[4 * step]);
    v[0] = OF_ZERO * v[0] + sum_p + sum_q;
    v[step] = difference_p + difference_q;
    v[2 * step] = P * P * sum_p + Q * Q * sum_q + v[5 * step];
}

/* Applies one of these to the columns of 6 by 6 values, then to their rows. */
INLINE void apply(transform *const transform_line, vec *values, const int columns, const int rows) {
    UNROLL for (int x = 0; x < columns; x++) transform_line(values + x, SIDE);
    UNROLL for (int y = 0; y < rows; y++) transform_line(values + y * SIDE, 1);
}

typedef struct {
    int64_t number, height, width, down, across, tiles;
} tiling;

INLINE tiling plan_tiling(int64_t number, int64_t height, int64_t width) {
    const int64_t down = (height + TILE - 1) / TILE, across = (width + TILE - 1) / TILE;
    return (tiling){number, height, width, down, across, number * down * across};
}
#endif

/* Where the pixels of a tile are, `side` in each direction, from `before` above and left of its results on; `zeros` for
 * those outside of the images. */
INLINE void NAME(find_tile)(const real **pixels, const tiling *plan, int64_t tile, int64_t end, const real *images,
                            int64_t channels, const int side, const int before, const real *zeros) {
    const int64_t n = tile / (plan->down * plan->across), top = tile / plan->across % plan->down * TILE - before;
    const int64_t left = tile % plan->across * TILE - before;
    for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x++) {
            const int64_t row = top + y, column = left + x;
            const int inside = row >= 0 && row < plan->height && column >= 0 && column < plan->width && tile < end;
            pixels[y * SIDE + x] =
                inside ? images + ((n * plan->height + row) * plan->width + column) * channels : zeros;
        }
}

/* To sums of ROWS_AT_ONCE rows and `wide` vectors, the product of words on the left, whose rows are `left_row` and
 * whose columns are `left_step` apart, with rows of words on the right. */
INLINE void NAME(multiply_words)(float *out, int64_t out_row, const uint32_t *left, int64_t left_row,
                                 int64_t left_step, const uint32_t *right, int64_t right_row, int64_t depth,
                                 const int wide, const int adds) {
    vec sums[ROWS_AT_ONCE][WIDE];
    UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++)
        UNROLL for (int i = 0; i < wide; i++) sums[r][i] = adds ? load(out + r * out_row + i * LANES) : (vec){0};
    for (int64_t k = 0; k < depth; k++, left += left_step, right += right_row) {
        vec columns[WIDE];
        UNROLL for (int i = 0; i < wide; i++) columns[i] = load((const float *)right + i * LANES);
        UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++)
            UNROLL for (int i = 0; i < wide; i++)
                sums[r][i] = NAME(add_products)(sums[r][i], left + r * left_row, columns[i]);
    }
    UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++)
        UNROLL for (int i = 0; i < wide; i++) store(out + r * out_row + i * LANES, sums[r][i]);
}

/* The same for any number of vectors up to WIDE. */
INLINE void NAME(multiply_panel)(float *out, int64_t out_row, const uint32_t *left, int64_t left_row,
                                 int64_t left_step, const uint32_t *right, int64_t right_row, int64_t depth,
                                 int64_t rows, int64_t wide, const int adds) {
    for (int64_t r = 0; r < rows; r += ROWS_AT_ONCE) switch (wide) {
#define CASE(count)                                                                                                    \
    case count:                                                                                                        \
        NAME(multiply_words)(out + r * out_row, out_row, left + r * left_row, left_row, left_step, right, right_row,   \
                             depth, count, adds);                                                                      \
        break;
            CASE(1) CASE(2)
#if WIDE == 4
            CASE(3) CASE(4)
#endif
#undef CASE
        }
}

/* Filters at the points, channels by outputs in words, whose rows are as long as there are vectors of outputs.
 * 0 out [36, C / DEPTH, O'], 1 filters (floats) [3, 3, C, O], 2 C, 3 O, 4 threads */
static void NAME(transform_filters)(const int64_t *a) {
    const int64_t channels = a[2], outputs = a[3], depth = channels / DEPTH, row = round_up(outputs);
#pragma omp parallel for num_threads((int)a[4]) schedule(static)
    for (int64_t k = 0; k < depth; k++)
        for (int64_t o = 0; o < outputs; o += LANES) {
            vec values[DEPTH][POINTS];
            UNROLL for (int d = 0; d < DEPTH; d++) {
                for (int i = 0; i < 9; i++)
                    values[d][i / 3 * SIDE + i % 3] = load_some(
                        (const float *)a[1] + (i * channels + k * DEPTH + d) * outputs + o, outputs - o);
                apply(transform_filter_line, values[d], 3, SIDE);
            }
            for (int i = 0; i < POINTS; i++)
                NAME(store_words)((uint32_t *)a[0] + (i * depth + k) * row + o, values[0][i], values[DEPTH - 1][i]);
        }
}

/* Images are padded with a pixel of zeros; with filters in the other order and mirrored, the gradient of the images.
 * 0 out [N, H, W, O], or, without memory, where to write how many bytes a thread needs; 1 images [N, H, W, C],
 * 2 filters at the points, 3 memory or 0, 4 N, 5 H, 6 W, 7 C, 8 O, 9 threads */
static void NAME(convolve_tiles)(const int64_t *a) {
    const tiling plan = plan_tiling(a[4], a[5], a[6]);
    const int64_t channels = a[7], outputs = a[8], threads = a[9], depth = channels / DEPTH;
    const int64_t row = round_up(channels) / DEPTH + GAP, point = BLOCK * row + GAP, filter_row = round_up(outputs);
    const int64_t panel = WIDE * LANES, panel_point = BLOCK * panel + GAP;
    const int64_t words = POINTS * (point + panel_point) + round_up(channels);
    if (!a[3]) {
        *(int64_t *)a[0] = words * 4;
        return;
    }
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t t = 0; t < threads; t++) {
        uint32_t *images = (uint32_t *)a[3] + t * words;
        float *results = (float *)(images + POINTS * point);
        const real *zeros = (const real *)(results + POINTS * panel_point);
        const int64_t end = plan.tiles * (t + 1) / threads;
        memset(images, 0, (size_t)words * 4);
        for (int64_t first = plan.tiles * t / threads; first < end; first += BLOCK) {
            const int64_t some = end - first < BLOCK ? end - first : BLOCK;
            for (int64_t i = 0; i < some; i++) {
                const real *pixels[POINTS];
                NAME(find_tile)(pixels, &plan, first + i, end, (const real *)a[1], channels, SIDE, 1, zeros);
                for (int64_t c = 0; c < channels; c += LANES) {
                    vec values[POINTS];
                    UNROLL_POINTS for (int p = 0; p < POINTS; p++)
                        values[p] = NAME(read)(pixels[p] + c, channels - c);
                    apply(transform_pixels, values, SIDE, SIDE);
                    UNROLL_POINTS for (int p = 0; p < POINTS; p++)
                        NAME(store_channels)(images + p * point + i * row + c / DEPTH, values[p]);
                }
            }
            for (int64_t o = 0; o < outputs; o += panel) {
                const int64_t vectors = (filter_row - o < panel ? filter_row - o : panel) / LANES;
                for (int p = 0; p < POINTS; p++)
                    NAME(multiply_panel)(results + p * panel_point, panel, images + p * point, row, 1,
                                         (const uint32_t *)a[2] + p * depth * filter_row + o, filter_row, depth, some,
                                         vectors, 0);
                for (int64_t i = 0; i < some; i++) {
                    const int64_t tile = first + i, top = tile / plan.across % plan.down * TILE;
                    const int64_t left = tile % plan.across * TILE, n = tile / (plan.down * plan.across);
                    const int64_t high = plan.height - top, broad = plan.width - left;
                    real *to = (real *)a[0] + ((n * plan.height + top) * plan.width + left) * outputs + o;
                    for (int64_t v = 0; v < vectors * LANES; v += LANES) {
                        vec values[POINTS];
                        UNROLL_POINTS for (int p = 0; p < POINTS; p++)
                            values[p] = load(results + p * panel_point + i * panel + v);
                        apply(transform_results, values, SIDE, TILE);
                        UNROLL for (int y = 0; y < TILE; y++)
                            UNROLL for (int x = 0; x < TILE; x++)
                                if (y < high && x < broad)
                                    NAME(write)(to + (y * plan.width + x) * outputs + v, values[y * SIDE + x],
                                                outputs - o - v);
                    }
                }
            }
        }
    }
}

/* Tiles at the points, in rows of channels; a word holds those of DEPTH tiles. */
INLINE void NAME(put_tiles)(transform *const transform_line, uint32_t *to, int64_t row, const tiling *plan,
                            int64_t first, int64_t end, const real *images, int64_t channels, const int side,
                            const int before, const real *zeros) {
    for (int64_t i = 0; i < BLOCK; i++) {
        const real *pixels[DEPTH][POINTS];
        for (int d = 0; d < DEPTH; d++)
            NAME(find_tile)(pixels[d], plan, first + i * DEPTH + d, end, images, channels, side, before, zeros);
        for (int64_t c = 0; c < channels; c += LANES) {
            vec values[DEPTH][POINTS];
            UNROLL for (int d = 0; d < DEPTH; d++) {
                UNROLL for (int y = 0; y < side; y++)
                    UNROLL for (int x = 0; x < side; x++)
                        values[d][y * SIDE + x] = NAME(read)(pixels[d][y * SIDE + x] + c, channels - c);
                apply(transform_line, values[d], side, SIDE);
            }
            UNROLL_POINTS for (int p = 0; p < POINTS; p++)
                NAME(store_words)(to + p * (BLOCK * row + GAP) + i * row + c, values[0][p], values[DEPTH - 1][p]);
        }
    }
}

/* The gradient of the filters.
 * 0 out (floats) [3, 3, C, O], or, without memory, where to write how many bytes a thread needs; 1 gradients
 * [N, H, W, O], 2 images [N, H, W, C], 3 memory or 0, 4 N, 5 H, 6 W, 7 C, 8 O, 9 threads */
static void NAME(correlate_tiles)(const int64_t *a) {
    const tiling plan = plan_tiling(a[4], a[5], a[6]);
    const int64_t channels = a[7], outputs = a[8], threads = a[9], panel = WIDE * LANES;
    const int64_t rows = (channels + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * ROWS_AT_ONCE, sum_row = round_up(outputs);
    const int64_t image_row = round_up(channels) + GAP, gradient_row = sum_row + GAP;
    const int64_t sums_size = POINTS * rows * sum_row, zeros_size = image_row + gradient_row;
    const int64_t words = sums_size + POINTS * (BLOCK * zeros_size + 2 * GAP) + zeros_size;
    if (!a[3]) {
        *(int64_t *)a[0] = words * 4;
        return;
    }
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t t = 0; t < threads; t++) {
        float *sums = (float *)a[3] + t * words;
        uint32_t *images = (uint32_t *)(sums + sums_size);
        uint32_t *gradients = images + POINTS * (BLOCK * image_row + GAP);
        const real *zeros = (const real *)(gradients + POINTS * (BLOCK * gradient_row + GAP));
        const int64_t end = plan.tiles * (t + 1) / threads;
        memset(sums, 0, (size_t)words * 4);
        for (int64_t first = plan.tiles * t / threads; first < end; first += BLOCK * DEPTH) {
            NAME(put_tiles)(transform_pixels, images, image_row, &plan, first, end, (const real *)a[2], channels,
                            SIDE, 1, zeros);
            NAME(put_tiles)(transform_gradients, gradients, gradient_row, &plan, first, end, (const real *)a[1],
                            outputs, TILE, 0, zeros);
            for (int p = 0; p < POINTS; p++)
                for (int64_t o = 0; o < outputs; o += panel)
                    NAME(multiply_panel)(sums + p * rows * sum_row + o, sum_row,
                                         images + p * (BLOCK * image_row + GAP), 1, image_row,
                                         gradients + p * (BLOCK * gradient_row + GAP) + o, gradient_row, BLOCK, rows,
                                         (sum_row - o < panel ? sum_row - o : panel) / LANES, 1);
        }
    }
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t c = 0; c < channels; c++)
        for (int64_t o = 0; o < outputs; o += LANES) {
            vec values[POINTS];
            for (int p = 0; p < POINTS; p++) {
                values[p] = (vec){0};
                for (int64_t t = 0; t < threads; t++)
                    values[p] += load((const float *)a[3] + t * words + (p * rows + c) * sum_row + o);
            }
            apply(transform_sums, values, SIDE, 3);
            for (int i = 0; i < 9; i++)
                store_some((float *)a[0] + (i * channels + c) * outputs + o, values[i / 3 * SIDE + i % 3], outputs - o);
        }
}
