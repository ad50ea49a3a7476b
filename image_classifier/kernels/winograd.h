/* 3x3 convolutions with stride 1 by Winograd's F(4x4, 3x3) (Lavin, Gray: Fast Algorithms for Convolutional Neural
 * Networks, 2016): a tile of 4 by 4 results takes 36 products for each pair of channels, where it took 144.
 *
 * A filter, and the 6 by 6 pixels that a tile's results come from, are read as polynomials in two variables and
 * evaluated at 6 by 6 points; there they are multiplied, as 36 products of matrices; the results are found from their
 * values again. The points are 0, +-0.6, +-1.5 and infinity: in bf16 their errors are smaller than those of the usual
 * 0, +-1, +-2.
 *
 * large.c includes this once for each type of numbers. What is multiplied stands in words of 32 bits, which hold DEPTH
 * factors of as many products: one float, or two bf16 (VNNI layout). */
#ifndef WINOGRAD_H
#define WINOGRAD_H
#define UNROLL_POINTS _Pragma("GCC unroll 36")
#define P 0.6f
#define Q 1.5f

enum {
    TILE = WINOGRAD_TILE,
    POINTS = WINOGRAD_POINTS,
    SIDE = 6,         /* of the pixels of a tile, and of the points */
    ROWS_AT_ONCE = 6, /* of a micro-kernel, WIDE vectors each */
    PANEL = WIDE * LANES,  /* outputs of a micro-kernel, whose filters are packed together */
    GROUP = 4 * LANES,     /* outputs whose results are found together */
    BLOCK = 48,       /* rows of words that are transformed at a time: they stay in a core's second cache */
    MOST_WORDS = 96,  /* the same for the gradient of filters, whose sums pass through the caches once for each block */
    CHANNELS_AHEAD = 2 * LANES, /* that are fetched before they are read */
    WORDS_AHEAD = 48 * LANES,   /* the same, of filters */
    GAP = 16          /* words between rows, whose addresses would else share a few lines of the caches */
};

typedef void transform(reg *, int);

/* One after the other: pixels to points, gradients of results to points, points to results, filters to points, points
 * to gradients of filters; in place, on values that are `step` apart. */
INLINE void transform_pixels(reg *v, int step) {
    const reg a = v[0], b = v[step], c = v[2 * step], d = v[3 * step], e = v[4 * step], f = v[5 * step];
    const reg even_p = scale_add_reg(-Q * Q, c, e), odd_p = scale_add_reg(-P * Q * Q, b, P * d);
    const reg even_q = scale_add_reg(-P * P, c, e), odd_q = scale_add_reg(-Q * P * P, b, Q * d);
    v[0] = scale_add_reg(P * P * Q * Q, a, scale_add_reg(-(P * P + Q * Q), c, e));
    v[step] = even_p + odd_p, v[2 * step] = even_p - odd_p;
    v[3 * step] = even_q + odd_q, v[4 * step] = even_q - odd_q;
    v[5 * step] = scale_add_reg(P * P * Q * Q, b, scale_add_reg(-(P * P + Q * Q), d, f));
}

INLINE void transform_gradients(reg *v, int step) {
    const reg a = v[0], b = v[step], c = v[2 * step], d = v[3 * step];
    const reg even_p = scale_add_reg(P * P, c, a), odd_p = scale_add_reg(P * P * P, d, P * b);
    const reg even_q = scale_add_reg(Q * Q, c, a), odd_q = scale_add_reg(Q * Q * Q, d, Q * b);
    v[step] = even_p + odd_p, v[2 * step] = even_p - odd_p;
    v[3 * step] = even_q + odd_q, v[4 * step] = even_q - odd_q;
    v[5 * step] = d;
}

INLINE void transform_results(reg *v, int step) {
    const reg sum_p = v[step] + v[2 * step], difference_p = v[step] - v[2 * step];
    const reg sum_q = v[3 * step] + v[4 * step], difference_q = v[3 * step] - v[4 * step];
    v[0] = v[0] + sum_p + sum_q;
    v[step] = scale_add_reg(P, difference_p, Q * difference_q);
    v[2 * step] = scale_add_reg(P * P, sum_p, Q * Q * sum_q);
    v[3 * step] = scale_add_reg(P * P * P, difference_p, scale_add_reg(Q * Q * Q, difference_q, v[5 * step]));
}

#define OF_ZERO (1 / (P * P * Q * Q))
#define OF_P (1 / (2 * P * P * (P * P - Q * Q)))
#define OF_Q (1 / (2 * Q * Q * (Q * Q - P * P)))

INLINE void transform_filter_line(reg *v, int step) {
    const reg a = v[0], b = v[step], c = v[2 * step];
    const reg even_p = OF_P * scale_add_reg(P * P, c, a), odd_p = OF_P * P * b;
    const reg even_q = OF_Q * scale_add_reg(Q * Q, c, a), odd_q = OF_Q * Q * b;
    v[0] = OF_ZERO * a;
    v[step] = even_p + odd_p, v[2 * step] = even_p - odd_p;
    v[3 * step] = even_q + odd_q, v[4 * step] = even_q - odd_q;
    v[5 * step] = c;
}

INLINE void transform_sums(reg *v, int step) {
    const reg sum_p = OF_P * (v[step] + v[2 * step]), difference_p = OF_P * P * (v[step] - v[2 * step]);
    const reg sum_q = OF_Q * (v[3 * step] + v[4 * step]), difference_q = OF_Q * Q * (v[3 * step] - v[4 * step]);
    v[0] = scale_add_reg(OF_ZERO, v[0], sum_p + sum_q);
    v[step] = difference_p + difference_q;
    v[2 * step] = scale_add_reg(P * P, sum_p, scale_add_reg(Q * Q, sum_q, v[5 * step]));
}

/* Applies one of these to the columns of 6 by 6 values, then to their rows. */
INLINE void apply(transform *const transform_line, reg *values, const int columns, const int rows) {
    UNROLL for (int x = 0; x < columns; x++) transform_line(values + x, SIDE);
    UNROLL for (int y = 0; y < rows; y++) transform_line(values + y * SIDE, 1);
}

typedef struct {
    int64_t height, width, down, across, tiles;
} tiling;

INLINE tiling plan_tiling(int64_t num_images, int64_t height, int64_t width) {
    const int64_t down = (height + TILE - 1) / TILE, across = (width + TILE - 1) / TILE;
    return (tiling){height, width, down, across, num_images * down * across};
}

/* Where the filters at a point begin that go to the panel with an output: words by depth, in rows of a panel. */
INLINE int64_t find_panel(int64_t point, int64_t output, int64_t depth, int64_t outputs) {
    return (point * ((outputs + PANEL - 1) / PANEL) + output / PANEL) * depth * PANEL + point * GAP;
}
#endif

/* Where the pixels of a tile are, `side` in each direction, from `before` above and left of its results on; `zeros` for
 * those outside of the images. */
INLINE void NAME(find_tile)(const real **pixels, const tiling *tiles, int64_t tile, const real *images,
                            int64_t channels, const int side, const int before, const real *zeros) {
    const int64_t n = tile / (tiles->down * tiles->across), top = tile / tiles->across % tiles->down * TILE - before;
    const int64_t left = tile % tiles->across * TILE - before;
    for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x++) {
            const int64_t row = top + y, column = left + x;
            const int is_down = row >= 0 && row < tiles->height && tile < tiles->tiles;
            const int is_inside = is_down && column >= 0 && column < tiles->width;
            pixels[y * SIDE + x] =
                is_inside ? images + ((n * tiles->height + row) * tiles->width + column) * channels : zeros;
        }
}

/* The micro-kernel: to sums of ROWS_AT_ONCE rows and `wide` vectors, the product of words on the left, whose rows are
 * `left_row` and whose columns are `left_step` apart, with rows of words on the right. Sums that are added to are those
 * of many points: the next rows are fetched ahead. Where there are none, it is what is on the right that is new. */
INLINE void NAME(multiply_words)(float *out, int64_t out_row, const uint32_t *left, int64_t left_row,
                                 int64_t left_step, const uint32_t *right, int64_t right_row, int64_t depth,
                                 const int wide, const int adds) {
    vec sums[ROWS_AT_ONCE][WIDE];
    if (adds) UNROLL for (int r = ROWS_AT_ONCE; r < 2 * ROWS_AT_ONCE; r++) __builtin_prefetch(out + r * out_row, 1);
    UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++)
        UNROLL for (int i = 0; i < wide; i++) sums[r][i] = adds ? load(out + r * out_row + i * LANES) : (vec){0};
    for (int64_t k = 0; k < depth; k++, left += left_step, right += right_row) {
        vec columns[WIDE];
        UNROLL for (int i = 0; i < wide; i++) {
            columns[i] = load((const float *)right + i * LANES);
            if (!adds) __builtin_prefetch(right + i * LANES + WORDS_AHEAD);
        }
        UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++)
            UNROLL for (int i = 0; i < wide; i++)
                sums[r][i] = NAME(add_products)(sums[r][i], left + r * left_row, columns[i]);
    }
    UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++)
        UNROLL for (int i = 0; i < wide; i++) store(out + r * out_row + i * LANES, sums[r][i]);
}

/* The same for a panel of any number of vectors up to WIDE. */
INLINE void NAME(multiply_panel)(float *out, int64_t out_row, const uint32_t *left, int64_t left_row,
                                 int64_t left_step, const uint32_t *right, int64_t right_row, int64_t depth,
                                 int64_t rows, int64_t wide, const int adds) {
    for (int64_t r = 0; r < rows; r += ROWS_AT_ONCE) switch (wide) {
#define CASE(count)                                                                                                    \
    case count:                                                                                                        \
        NAME(multiply_words)(out + r * out_row, out_row, left + r * left_row, left_row, left_step, right, right_row,   \
                             depth, count, adds);                                                                      \
        break;
            CASE(1)
#if WIDE == 4
            CASE(2) CASE(3) CASE(4)
#endif
#undef CASE
        }
}

int64_t NAME(winograd_filters_scratch)(const struct winograd_filters *a) {
    return find_panel(POINTS, 0, a->channels / DEPTH, a->outputs) * 4;
}

void NAME(winograd_filters)(const struct winograd_filters *a) {
    const int64_t channels = a->channels, outputs = a->outputs, depth = channels / DEPTH;
    const real *filters = a->filters;
    uint32_t *to = a->scratch;
    for (int64_t k = 0; k < depth; k++)
        for (int64_t o = 0; o < round_up(outputs); o += REGISTER) {
            const int64_t some = outputs - o < REGISTER ? outputs - o : REGISTER;
            reg values[DEPTH][POINTS];
            UNROLL for (int d = 0; d < DEPTH; d++) {
                const int64_t c = k * DEPTH + d;
                for (int i = 0; i < 9; i++) {
                    reg *value = values[d] + i / 3 * SIDE + i % 3;
                    if (a->is_for_gradient) {
                        *value = NAME(read)(filters + (c * 9 + 8 - i) * outputs + o, some);
                    } else {
                        float lanes[REGISTER] = {0};
                        for (int64_t j = 0; j < some; j++) lanes[j] = widen(filters[((o + j) * 9 + i) * channels + c]);
                        *value = load_reg(lanes);
                    }
                }
                apply(transform_filter_line, values[d], 3, SIDE);
            }
            for (int i = 0; i < POINTS; i++)
                NAME(store_words)(to + find_panel(i, o, depth, outputs) + k * PANEL + o % PANEL, values[0][i],
                                  values[DEPTH - 1][i]);
        }
}

/* How a convolution goes about it: blocks of tiles, and groups of outputs. */
typedef struct {
    tiling tiles;
    int64_t depth, row, point, group_point, words;
} NAME(convolve_plan);

INLINE NAME(convolve_plan) NAME(plan_convolve)(const struct winograd_convolve *a) {
    NAME(convolve_plan) plan = {.tiles = plan_tiling(a->num_images, a->height, a->width)};
    plan.depth = a->channels / DEPTH;
    plan.row = round_up(a->channels) / DEPTH + GAP;
    plan.point = BLOCK * plan.row + GAP;
    plan.group_point = BLOCK * GROUP + GAP;
    plan.words = POINTS * (plan.point + plan.group_point) + round_up(a->channels);
    return plan;
}

int64_t NAME(winograd_convolve_scratch)(const struct winograd_convolve *a) { return NAME(plan_convolve)(a).words * 4; }

/* Takes some channels of a tile's pixels, up to a register of them, to the points. */
INLINE void NAME(transform_tile)(transform *const transform_line, reg *values, const real **pixels, const int side,
                                 int64_t c, int64_t some) {
    UNROLL for (int y = 0; y < side; y++)
        UNROLL for (int x = 0; x < side; x++) values[y * SIDE + x] = NAME(read)(pixels[y * SIDE + x] + c, some);
    if (c % LANES == 0)
        UNROLL for (int y = 0; y < side; y++)
            UNROLL for (int x = 0; x < side; x++) __builtin_prefetch(pixels[y * SIDE + x] + c + CHANNELS_AHEAD);
    apply(transform_line, values, side, SIDE);
}

INLINE void NAME(put_channels)(uint32_t *to, int64_t point, const real **pixels, int64_t c, int64_t some) {
    reg values[POINTS];
    NAME(transform_tile)(transform_pixels, values, pixels, SIDE, c, some);
    to += c / DEPTH;
    UNROLL for (int y = 0; y < SIDE; y++, to += SIDE * point)
        UNROLL for (int x = 0; x < SIDE; x++) NAME(store_channels)(to + x * point, values[y * SIDE + x]);
}

/* Takes some tiles of images to the points. */
INLINE void NAME(transform_block)(const NAME(convolve_plan) * plan, const real *images, int64_t channels, int64_t first,
                                  int64_t some, uint32_t *to, const real *zeros) {
    const int64_t whole = channels / REGISTER * REGISTER;
    for (int64_t i = 0; i < some; i++, to += plan->row) {
        const real *pixels[POINTS];
        NAME(find_tile)(pixels, &plan->tiles, first + i, images, channels, SIDE, 1, zeros);
        for (int64_t c = 0; c < whole; c += REGISTER) NAME(put_channels)(to, plan->point, pixels, c, REGISTER);
        if (whole < channels) NAME(put_channels)(to, plan->point, pixels, whole, channels - whole);
    }
}

/* Writes a register of a tile's results, or less. */
INLINE void NAME(write_tile)(real *to, int64_t row, int64_t outputs, const float *results, int64_t point, int64_t high,
                             int64_t broad, int64_t count) {
    reg values[POINTS];
    UNROLL for (int y = 0; y < SIDE; y++, results += SIDE * point)
        UNROLL for (int x = 0; x < SIDE; x++) values[y * SIDE + x] = load_reg(results + x * point);
    apply(transform_results, values, SIDE, TILE);
    UNROLL for (int y = 0; y < TILE; y++)
        UNROLL for (int x = 0; x < TILE; x++)
            if (y < high && x < broad) NAME(write)(to + y * row + x * outputs, values[y * SIDE + x], count);
}

/* Writes the results of some tiles, for a group of outputs that begins with `o`. */
INLINE void NAME(write_block)(const NAME(convolve_plan) * plan, const float *results, int64_t first, int64_t some,
                              real *out, int64_t outputs, int64_t o, int64_t vectors) {
    const tiling *tiles = &plan->tiles;
    for (int64_t i = 0; i < some; i++) {
        const int64_t tile = first + i, top = tile / tiles->across % tiles->down * TILE;
        const int64_t left = tile % tiles->across * TILE, n = tile / (tiles->down * tiles->across);
        const int64_t high = tiles->height - top, broad = tiles->width - left;
        real *to = out + ((n * tiles->height + top) * tiles->width + left) * outputs + o;
        for (int64_t v = 0; v < vectors * LANES; v += REGISTER) {
            const float *from = results + i * GROUP + v;
            const int64_t row = tiles->width * outputs, count = outputs - o - v;
            if (high >= TILE && broad >= TILE && count >= REGISTER)
                NAME(write_tile)(to + v, row, outputs, from, plan->group_point, TILE, TILE, REGISTER);
            else
                NAME(write_tile)(to + v, row, outputs, from, plan->group_point, high, broad, count);
        }
    }
}

void NAME(winograd_convolve)(const struct winograd_convolve *a) {
    const NAME(convolve_plan) plan = NAME(plan_convolve)(a);
    uint32_t *images = a->scratch;
    float *results = (float *)(images + POINTS * plan.point);
    const real *zeros = (const real *)(results + POINTS * plan.group_point);
    const int64_t all_vectors = round_up(a->outputs) / LANES;
    memset(images, 0, (size_t)plan.words * 4);
    for (int64_t first = 0; first < plan.tiles.tiles; first += BLOCK) {
        const int64_t some = plan.tiles.tiles - first < BLOCK ? plan.tiles.tiles - first : BLOCK;
        NAME(transform_block)(&plan, a->images, a->channels, first, some, images, zeros);
        for (int64_t o = 0; o < a->outputs; o += GROUP) {
            const int64_t left = all_vectors - o / LANES, vectors = left < GROUP / LANES ? left : GROUP / LANES;
            for (int p = 0; p < POINTS; p++)
                for (int64_t v = 0; v < vectors; v += WIDE) {
                    const int64_t panel = find_panel(p, o + v * LANES, plan.depth, a->outputs);
                    NAME(multiply_panel)(results + p * plan.group_point + v * LANES, GROUP, images + p * plan.point,
                                         plan.row, 1, (const uint32_t *)a->filters + panel, PANEL, plan.depth, some,
                                         vectors - v < WIDE ? vectors - v : WIDE, 0);
                }
            NAME(write_block)(&plan, results, first, some, a->out, a->outputs, o, vectors);
        }
    }
}

/* How the gradient of filters goes about it: blocks of words, which hold DEPTH tiles each. */
typedef struct {
    tiling tiles;
    int64_t rows, sum_row, sum_point, image_row, gradient_row, block, sums, zeros, words;
} NAME(correlate_plan);

INLINE NAME(correlate_plan) NAME(plan_correlate)(const struct winograd_filter_gradient *a) {
    NAME(correlate_plan) plan = {.tiles = plan_tiling(a->num_images, a->height, a->width)};
    plan.rows = (a->channels + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * ROWS_AT_ONCE;
    plan.sum_row = round_up(a->outputs);
    plan.image_row = round_up(a->channels) + GAP;
    plan.gradient_row = plan.sum_row + GAP;
    const int64_t num_words = (plan.tiles.tiles + DEPTH - 1) / DEPTH;
    const int64_t num_blocks = (num_words + MOST_WORDS - 1) / MOST_WORDS;
    plan.block = (num_words + num_blocks - 1) / num_blocks;
    plan.sum_point = plan.rows * plan.sum_row + GAP;
    plan.sums = POINTS * plan.sum_point;
    plan.zeros = plan.image_row + plan.gradient_row;
    plan.words = plan.sums + POINTS * (plan.block * plan.zeros + 2 * GAP) + plan.zeros;
    return plan;
}

int64_t NAME(winograd_filter_gradient_scratch)(const struct winograd_filter_gradient *a) {
    return NAME(plan_correlate)(a).words * 4;
}

/* Takes tiles to the points, in rows of channels. */
INLINE void NAME(put_tiles)(transform *const transform_line, uint32_t *to, int64_t row, int64_t block,
                            const tiling *tiles, int64_t first, const real *images, int64_t channels, const int side,
                            const int before, const real *zeros) {
    const int64_t point = block * row + GAP;
    for (int64_t i = 0; i < block; i++) {
        const real *pixels[DEPTH][POINTS];
        for (int d = 0; d < DEPTH; d++)
            NAME(find_tile)(pixels[d], tiles, first + i * DEPTH + d, images, channels, side, before, zeros);
        for (int64_t c = 0; c < channels; c += REGISTER) {
            reg values[DEPTH][POINTS];
            UNROLL for (int d = 0; d < DEPTH; d++)
                if (channels - c >= REGISTER)
                    NAME(transform_tile)(transform_line, values[d], pixels[d], side, c, REGISTER);
                else
                    NAME(transform_tile)(transform_line, values[d], pixels[d], side, c, channels - c);
            uint32_t *place = to + i * row + c;
            UNROLL for (int y = 0; y < SIDE; y++, place += SIDE * point)
                UNROLL for (int x = 0; x < SIDE; x++)
                    NAME(store_words)(place + x * point, values[0][y * SIDE + x], values[DEPTH - 1][y * SIDE + x]);
        }
    }
}

/* Finds up to a register of filters' gradients in both directions from the sums at the points. */
INLINE void NAME(write_filters)(const NAME(correlate_plan) * plan, const float *sums, real *out, int64_t channels,
                                int64_t outputs, int64_t c, int64_t o) {
    const int64_t some_channels = channels - c < REGISTER ? channels - c : REGISTER;
    const int64_t some_outputs = outputs - o < REGISTER ? outputs - o : REGISTER;
    float filters[9][REGISTER][REGISTER]; /* of outputs, of channels */
    memset(filters, 0, sizeof filters);
    for (int64_t i = 0; i < some_channels; i++) {
        reg values[POINTS];
        float lanes[REGISTER];
        for (int p = 0; p < POINTS; p++) values[p] = load_reg(sums + p * plan->sum_point + (c + i) * plan->sum_row + o);
        apply(transform_sums, values, SIDE, 3);
        for (int k = 0; k < 9; k++) {
            store_reg(lanes, values[k / 3 * SIDE + k % 3]);
            for (int j = 0; j < REGISTER; j++) filters[k][j][i] = lanes[j];
        }
    }
    for (int64_t j = 0; j < some_outputs; j++)
        for (int k = 0; k < 9; k++)
            NAME(write)(out + ((o + j) * 9 + k) * channels + c, load_reg(filters[k][j]), some_channels);
}

void NAME(winograd_filter_gradient)(const struct winograd_filter_gradient *a) {
    const NAME(correlate_plan) plan = NAME(plan_correlate)(a);
    const int64_t block = plan.block;
    const int64_t image_point = block * plan.image_row + GAP, gradient_point = block * plan.gradient_row + GAP;
    float *sums = a->scratch;
    uint32_t *images = (uint32_t *)(sums + plan.sums), *gradients = images + POINTS * image_point;
    const real *zeros = (const real *)(gradients + POINTS * gradient_point);
    memset(images, 0, (size_t)(plan.words - plan.sums) * 4);
    for (int64_t first = 0; first < plan.tiles.tiles; first += block * DEPTH) {
        NAME(put_tiles)(transform_pixels, images, plan.image_row, block, &plan.tiles, first, a->images, a->channels,
                        SIDE, 1, zeros);
        NAME(put_tiles)(transform_gradients, gradients, plan.gradient_row, block, &plan.tiles, first, a->gradient,
                        a->outputs, TILE, 0, zeros);
        for (int p = 0; p < POINTS; p++)
            for (int64_t o = 0; o < a->outputs; o += PANEL)
                NAME(multiply_panel)(sums + p * plan.sum_point + o, plan.sum_row, images + p * image_point, 1,
                                     plan.image_row, gradients + p * gradient_point + o, plan.gradient_row, block,
                                     plan.rows, (plan.sum_row - o < PANEL ? plan.sum_row - o : PANEL) / LANES,
                                     first > 0);
    }
    for (int64_t c = 0; c < a->channels; c += REGISTER)
        for (int64_t o = 0; o < a->outputs; o += REGISTER)
            NAME(write_filters)(&plan, sums, a->out, a->channels, a->outputs, c, o);
}
