/* Convolutions and products of matrices of all sizes, in floats, by the micro-kernel of winograd.h. */

void norm(const struct norm *a);

enum { DEPTH_AT_ONCE = 256 }; /* of a product of matrices: its rows stay in a core's second cache */

/* A copy of the micro-kernel that all of these call: some rows, and up to WIDE vectors of columns. */
static void multiply_floats(float *out, int64_t out_row, const float *left, int64_t left_row, int64_t left_step,
                            const float *right, int64_t right_row, int64_t depth, int64_t rows, int64_t wide,
                            int adds) {
    const uint32_t *words = (const uint32_t *)left, *columns = (const uint32_t *)right;
    if (adds)
        multiply_panel_float(out, out_row, words, left_row, left_step, columns, right_row, depth, rows, wide, 1);
    else
        multiply_panel_float(out, out_row, words, left_row, left_step, columns, right_row, depth, rows, wide, 0);
}

INLINE int64_t count_vectors(int64_t columns) {
    return (columns < PANEL ? columns + LANES - 1 : PANEL) / LANES;
}

INLINE int64_t round_up_rows(int64_t rows) { return (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * ROWS_AT_ONCE; }

/* Sizes of a convolution whose images are packed as pixels with zeros around them: all output pixels of an image are
 * computed as one row, with those between its rows, which are thrown away. */
typedef struct {
    int64_t pitch, height, width, count, image; /* count: of the pixels of that row; image: floats of a packed one */
} pixel_sizes;

INLINE pixel_sizes plan_pixels(int64_t channels, int64_t height, int64_t width, int64_t taps, int64_t padding) {
    pixel_sizes sizes = {.pitch = width + 2 * padding};
    sizes.height = height + 2 * padding - taps + 1;
    sizes.width = sizes.pitch - taps + 1;
    sizes.count = (sizes.height - 1) * sizes.pitch + sizes.width;
    sizes.image = ((height + 2 * padding) * sizes.pitch + ROWS_AT_ONCE + taps) * channels + ROWS_AT_ONCE;
    return sizes;
}

/* Copies an image to pixels, `padding` zeros around them. */
static void pack_image(float *to, const float *from, const int64_t *strides, int64_t channels, int64_t height,
                       int64_t width, int64_t padding, const pixel_sizes *sizes) {
    memset(to, 0, (size_t)sizes->image * 4);
    for (int64_t y = 0; y < height; y++) {
        float *row = to + ((y + padding) * sizes->pitch + padding) * channels;
        const float *source = from + y * strides[2];
        if (strides[1] == 1 && strides[3] == channels)
            memcpy(row, source, (size_t)(width * channels) * 4);
        else
            for (int64_t x = 0; x < width; x++)
                for (int64_t c = 0; c < channels; c++)
                    row[x * channels + c] = source[x * strides[3] + c * strides[1]];
    }
}

int64_t convolve_scratch_pixels(const struct convolve *a) {
    const int64_t filter = a->channels * a->taps * a->taps, panels = (a->outputs + PANEL - 1) / PANEL;
    const pixel_sizes sizes = plan_pixels(a->channels, a->height, a->width, a->taps, a->padding);
    return (panels * PANEL * (filter + 1) + ROWS_AT_ONCE * PANEL + sizes.image) * 4;
}

/* Lays filters out in panels of outputs, for each the bias and then its weights by tap and channel. */
static void pack_filters(float *to, const struct convolve *a) {
    const int64_t *strides = a->filter_strides;
    for (int64_t o = 0; o < a->outputs; o += PANEL) {
        const int64_t some = a->outputs - o < PANEL ? a->outputs - o : PANEL;
        memset(to, 0, PANEL * 4);
        for (int64_t i = 0; a->bias && i < some; i++) to[i] = a->bias[o + i];
        to += PANEL;
        for (int64_t ky = 0; ky < a->taps; ky++)
            for (int64_t kx = 0; kx < a->taps; kx++)
                for (int64_t c = 0; c < a->channels; c++, to += PANEL) {
                    const float *from =
                        a->filters + a->first_weight + c * strides[1] + ky * strides[2] + kx * strides[3];
                    for (int64_t i = 0; i < PANEL; i++) to[i] = i < some ? from[(o + i) * strides[0]] : 0.0f;
                }
    }
}

void convolve_pixels(const struct convolve *a) {
    const int64_t channels = a->channels, outputs = a->outputs, line = a->taps * channels;
    const pixel_sizes sizes = plan_pixels(channels, a->height, a->width, a->taps, a->padding);
    float *filters = a->scratch, *panel = filters;
    float *block = filters + (outputs + PANEL - 1) / PANEL * PANEL * (line * a->taps + 1);
    float *image = block + ROWS_AT_ONCE * PANEL;
    pack_filters(filters, a);
    for (int64_t n = 0; n < a->num_images; n++) {
        pack_image(image, a->images + n * a->image_strides[0], a->image_strides, channels, a->height, a->width,
                   a->padding, &sizes);
        panel = filters;
        for (int64_t o = 0; o < outputs; o += PANEL, panel += PANEL * (line * a->taps + 1)) {
            const int64_t vectors = count_vectors(outputs - o);
            for (int64_t q = 0; q < sizes.count; q += ROWS_AT_ONCE) {
                for (int r = 0; r < ROWS_AT_ONCE; r++) memcpy(block + r * PANEL, panel, PANEL * 4);
                for (int64_t ky = 0; ky < a->taps; ky++)
                    multiply_floats(block, PANEL, image + (q + ky * sizes.pitch) * channels, channels, 1,
                                    panel + PANEL * (1 + ky * line), PANEL, line, ROWS_AT_ONCE, vectors, 1);
                for (int64_t r = 0; r < ROWS_AT_ONCE && q + r < sizes.count; r++) {
                    const int64_t y = (q + r) / sizes.pitch, x = (q + r) % sizes.pitch;
                    if (x >= sizes.width) continue;
                    float *to = a->out + ((n * sizes.height + y) * sizes.width + x) * outputs + o;
                    for (int64_t v = 0; v < vectors * LANES; v += LANES)
                        store_some(to + v, load(block + r * PANEL + v), outputs - o - v);
                }
            }
        }
    }
}

int64_t convolve_filter_gradient_scratch_pixels(const struct convolve_filter_gradient *a) {
    const pixel_sizes sizes = plan_pixels(a->channels, a->height, a->width, a->taps, a->padding);
    const int64_t row = round_up(a->outputs), sums = a->taps * round_up_rows(a->taps * a->channels) * row;
    return (2 * (sums + row) + sizes.image + sizes.count * row) * 4;
}

/* The sums of an image are computed before they are added to those of the others, which keeps them exact. */
void convolve_filter_gradient_pixels(const struct convolve_filter_gradient *a) {
    const int64_t channels = a->channels, outputs = a->outputs, taps = a->taps, *strides = a->filter_strides;
    const pixel_sizes sizes = plan_pixels(channels, a->height, a->width, taps, a->padding);
    const int64_t row = round_up(outputs), rows = round_up_rows(taps * channels), num_sums = taps * rows * row + row;
    float *sums = a->scratch, *some = sums + num_sums, *image = some + num_sums, *gradient = image + sizes.image;
    float *of_bias = some + taps * rows * row;
    memset(sums, 0, (size_t)num_sums * 4);
    memset(some, 0, (size_t)num_sums * 4);
    memset(gradient, 0, (size_t)(sizes.count * row) * 4);
    for (int64_t n = 0; n < a->num_images; n++) {
        pack_image(image, a->images + n * a->image_strides[0], a->image_strides, channels, a->height, a->width,
                   a->padding, &sizes);
        for (int64_t y = 0; y < sizes.height; y++)
            for (int64_t x = 0; x < sizes.width; x++) {
                const int64_t *from = a->gradient_strides;
                const float *source = a->gradient + n * from[0] + y * from[2] + x * from[3];
                float *to = gradient + (y * sizes.pitch + x) * row;
                if (from[1] == 1)
                    memcpy(to, source, (size_t)outputs * 4);
                else
                    for (int64_t o = 0; o < outputs; o++) to[o] = source[o * from[1]];
            }
        for (int64_t ky = 0; a->of_filters && ky < taps; ky++)
            for (int64_t o = 0; o < outputs; o += PANEL)
                multiply_floats(some + ky * rows * row + o, row, image + ky * sizes.pitch * channels, 1, channels,
                                gradient + o, row, sizes.count, rows, count_vectors(outputs - o), 0);
        memset(of_bias, 0, (size_t)row * 4);
        for (int64_t q = 0; q < sizes.count; q++)
            for (int64_t o = 0; o < row; o++) of_bias[o] += gradient[q * row + o];
        for (int64_t i = 0; i < num_sums; i++) sums[i] += some[i];
    }
    for (int64_t o = 0; a->of_bias && o < outputs; o++) a->of_bias[o] = sums[taps * rows * row + o];
    for (int64_t ky = 0; a->of_filters && ky < taps; ky++)
        for (int64_t kx = 0; kx < taps; kx++)
            for (int64_t c = 0; c < channels; c++)
                for (int64_t o = 0; o < outputs; o++)
                    a->of_filters[o * strides[0] + c * strides[1] + ky * strides[2] + kx * strides[3]] =
                        sums[(ky * rows + kx * channels + c) * row + o];
}

int64_t multiply_scratch(const struct multiply *a) {
    const int64_t rows = round_up_rows(a->rows), row = round_up(a->columns);
    return (rows * row + rows * DEPTH_AT_ONCE + DEPTH_AT_ONCE * PANEL) * 4;
}

void multiply(const struct multiply *a) {
    const int64_t rows = round_up_rows(a->rows), row = round_up(a->columns);
    float *sums = a->scratch, *left = sums + rows * row, *right = left + rows * DEPTH_AT_ONCE;
    memset(sums, 0, (size_t)(rows * row) * 4);
    memset(left, 0, (size_t)(rows * DEPTH_AT_ONCE) * 4);
    for (int64_t k = 0; k < a->depth; k += DEPTH_AT_ONCE) {
        const int64_t depth = a->depth - k < DEPTH_AT_ONCE ? a->depth - k : DEPTH_AT_ONCE;
        for (int64_t m = 0; m < a->rows; m++) { /* the rows of a micro-kernel stand together */
            const float *from = a->left + m * a->left_strides[0] + k * a->left_strides[1];
            float *to = left + m / ROWS_AT_ONCE * ROWS_AT_ONCE * DEPTH_AT_ONCE + m % ROWS_AT_ONCE;
            for (int64_t i = 0; i < depth; i++) to[i * ROWS_AT_ONCE] = from[i * a->left_strides[1]];
        }
        for (int64_t n = 0; n < a->columns; n += PANEL) {
            const int64_t some = a->columns - n < PANEL ? a->columns - n : PANEL;
            for (int64_t i = 0; i < depth; i++) {
                const float *from = a->right + (k + i) * a->right_strides[0] + n * a->right_strides[1];
                float *to = right + i * PANEL;
                if (a->right_strides[1] == 1)
                    memcpy(to, from, (size_t)some * 4);
                else
                    for (int64_t j = 0; j < some; j++) to[j] = from[j * a->right_strides[1]];
                for (int64_t j = some; j < PANEL; j++) to[j] = 0.0f;
            }
            for (int64_t m = 0; m < rows; m += ROWS_AT_ONCE)
                multiply_floats(sums + m * row + n, row, left + m * DEPTH_AT_ONCE, 1, ROWS_AT_ONCE, right, PANEL, depth,
                                ROWS_AT_ONCE, count_vectors(some), 1);
        }
    }
    const float alpha = (float)a->alpha, beta = (float)a->beta;
    for (int64_t m = 0; m < a->rows; m++)
        for (int64_t n = 0; n < a->columns; n++) {
            const float sum = sums[m * row + n];
            const int64_t place = m * a->base_strides[0] + n * a->base_strides[1];
            a->out[m * a->columns + n] = a->base ? __builtin_fmaf(alpha, sum, beta * a->base[place]) : alpha * sum;
        }
}

int64_t orthogonalize_scratch(const struct orthogonalize *a) {
    const int64_t rows = a->rows, size = rows > a->columns ? rows : a->columns;
    const struct multiply most = {.rows = rows, .columns = size};
    return multiply_scratch(&most) + (rows * a->columns + 4 * rows * rows) * 4;
}

void orthogonalize(const struct orthogonalize *a) {
    const int64_t rows = a->rows, columns = a->columns, square = rows * rows;
    float *wide = a->scratch, *gram = wide + rows * columns, *polynomial = gram + square, *factor = polynomial + square;
    float *other = factor + square, size;
    void *scratch = other + square;
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < columns; n++)
            wide[m * columns + n] = a->matrix[m * a->matrix_strides[0] + n * a->matrix_strides[1]];
    norm(&(struct norm){&size, wide, rows * columns});
    for (int64_t i = 0; i < rows * columns; i++) wide[i] /= size + 1e-7f;
#define MULTIPLY(to, from, with, width, is_transposed, plus, factor_of_product, factor_of_plus)                       \
    multiply(&(struct multiply){to, from, with, plus, scratch, rows, (is_transposed) ? columns : rows, width,         \
                                {(is_transposed) ? columns : rows, 1},                                                \
                                {(is_transposed) ? 1 : width, (is_transposed) ? columns : 1},                         \
                                {rows, 1}, factor_of_product, factor_of_plus})
    MULTIPLY(gram, wide, wide, rows, 1, 0, 1.0, 0.0);
    for (int64_t i = 0; i < a->num_iterations; i++) {
        MULTIPLY(polynomial, gram, gram, rows, 0, gram, a->c, a->b);
        for (int64_t m = 0; m < rows; m++) polynomial[m * rows + m] += (float)a->a;
        if (i > 0) MULTIPLY(other, polynomial, factor, rows, 0, 0, 1.0, 0.0);
        memcpy(factor, i > 0 ? other : polynomial, (size_t)square * 4);
        if (i == a->num_iterations - 1) break;
        MULTIPLY(other, polynomial, gram, rows, 0, 0, 1.0, 0.0);
        MULTIPLY(gram, other, polynomial, rows, 0, 0, 1.0, 0.0);
    }
    MULTIPLY(a->out, factor, wide, columns, 0, 0, 1.0, 0.0);
#undef MULTIPLY
}
