/* What each kernel takes. This file is the one declaration: C includes it, and library.py reads it.
 *
 * A kernel is a function of one thread that gets a pointer to the struct with its name. Those that exist for several
 * types of numbers or layouts, such as max_pool_float and max_pool_bf16, share the struct of the name without the last
 * word. A kernel NAME that needs memory has a function NAME_scratch (NAME_scratch_float) that says how many bytes.
 *
 * N, C, H, W stand for images, channels, height and width, O for output channels, K for taps, M and L for rows and
 * columns. Sizes and strides count elements. */
#ifndef KERNELS_H
#define KERNELS_H
#include <stdint.h>

enum {
    WINOGRAD_TILE = 4,    /* results in each direction that F(4x4, 3x3) computes together */
    WINOGRAD_POINTS = 36, /* products that they take for each pair of channels */
    AMX_OUTPUTS = 32,     /* the number of output channels must be a multiple of it */
    ADD = 0,              /* operations of combine */
    SUBTRACT = 1,
    MULTIPLY = 2,
    DIVIDE = 3
};

/* Kernels to run one after the other. */
struct call {
    void (*kernel)(const void *);
    const void *arguments;
};

/* ---- Small batches: floats, images as planes [N, C, H, W]. ---- */

/* Convolution with stride 1. convolve_pixels gives out [N, H', W', O], and takes any number of taps. With filters whose
 * inputs and outputs are exchanged, and which run backwards from first_weight, the gradient of its input. */
struct convolve {
    float *out; /* [N, O, H + 2 padding - K + 1, W + 2 padding - K + 1] */
    const float *images, *filters, *bias; /* bias [O] or null */
    void *scratch;
    int64_t num_images, channels, height, width, outputs, taps, padding, first_weight;
    int64_t image_strides[4], filter_strides[4];
};

/* The gradients of a convolution's filters and bias, either of which may be null; at most 5 taps, but for
 * convolve_filter_gradient_pixels, which is for images of many channels. */
struct convolve_filter_gradient {
    float *of_filters, *of_bias;
    const float *images, *gradient;
    void *scratch;
    int64_t num_images, channels, height, width, outputs, taps, padding;
    int64_t image_strides[4], gradient_strides[4], filter_strides[4];
};

/* Maximum of 2x2 pixels, and which of the four it is: the first of equal ones; not a number if one of them is not. */
struct pool_planes {
    float *out;
    uint8_t *indices;
    const float *images;
    int64_t num_planes, height, width;
};

struct pool_planes_gradient {
    float *out; /* [N, C, H, W] */
    const uint8_t *indices;
    const float *gradient;
    int64_t num_images, channels, height, width, gradient_strides[4];
};

struct relu {
    float *out;
    const float *values;
    int64_t count;
};

struct relu_gradient {
    float *out;
    const float *gradient, *values; /* of the output, the output */
    int64_t count;
};

/* Matrix product [M, K] times [K, L], the rows of the right side contiguous. */
struct matmul {
    float *out; /* [M, L] */
    const float *left, *right, *bias; /* bias [L] or null */
    int64_t rows, depth, columns, left_row, left_column, right_row; /* the last three: strides */
};

/* Matrix product [M, K] times [K, L], the rows of the left side contiguous, and the columns of the right one. */
struct matmul_transposed {
    float *out; /* [M, L] */
    const float *left, *right, *bias; /* bias [L] or null */
    int64_t rows, depth, columns, left_row, right_column; /* the last two: strides */
};

/* The sum of the rows of [M, L]. */
struct sum_rows {
    float *out;
    const float *values;
    int64_t rows, columns;
};

struct copy {
    void *out;
    const void *values;
    int64_t num_bytes;
};

struct convert_bytes {
    float *out;
    const uint8_t *values;
    int64_t count;
};

/* A number of each channel is subtracted from its pixels, or they are divided by it. */
struct shift_channels {
    float *out; /* [N, C, P] */
    const float *values, *numbers;
    int64_t num_images, channels, num_pixels, divides;
};

struct log_softmax {
    float *out; /* [M, L] */
    const float *values;
    int64_t rows, columns;
};

/* Probabilities from what log_softmax takes. */
struct softmax {
    float *out; /* [M, L] */
    const float *values;
    int64_t rows, columns;
};

struct log_softmax_gradient {
    float *out; /* [M, L] */
    const float *gradient, *values; /* of the output, the output */
    int64_t rows, columns;
};

/* The mean of the negative logarithms of the labels' probabilities; not a number if a label is none of the classes. */
struct nll_loss {
    float *loss, *total; /* total: the number of labels */
    const float *values; /* [M, L] */
    const int64_t *labels; /* [M] */
    int64_t rows, columns;
};

struct nll_loss_gradient {
    float *out; /* [M, L] */
    const float *gradient; /* [] */
    const int64_t *labels;
    int64_t rows, columns;
};

/* Where the largest of each row is: the first of equal ones; what is not a number comes before all. */
struct argmax {
    int64_t *out; /* [M] */
    const float *values; /* [M, L] */
    int64_t rows, columns;
};

struct equal {
    uint8_t *out;
    const int64_t *left, *right;
    int64_t count;
};

struct count_true {
    int64_t *out;
    const uint8_t *values;
    int64_t count;
};

/* ---- Large batches: floats or bf16, the channels of a pixel next to each other [N, H, W, C]. ---- */

/* As pool_planes. */
struct max_pool {
    void *out;
    uint8_t *indices;
    const void *images;
    int64_t num_images, height, width, channels;
};

struct max_pool_gradient {
    void *out; /* [N, H, W, C] */
    const uint8_t *indices;
    const void *gradient;
    int64_t num_images, height, width, channels;
};

struct gelu {
    void *out;
    const void *values;
    int64_t count;
};

struct gelu_gradient {
    void *out;
    const void *gradient, *values; /* of the output, the input */
    int64_t count;
};

/* Batch norm while it trains, over all pixels [P, C]. */
struct batch_norm {
    void *out;
    float *mean, *scale; /* [C]; scale is one over the standard deviation */
    const void *values;
    const float *weight, *bias;
    float *running_mean, *running_variance;
    void *scratch;
    int64_t num_pixels, channels;
    double momentum, epsilon;
};

struct batch_norm_gradient {
    void *of_values; /* or null */
    float *of_weight, *of_bias;
    const void *gradient, *values;
    const float *weight, *mean, *scale;
    void *scratch;
    int64_t num_pixels, channels;
};

/* Filters at the points of F(4x4, 3x3): words [36, C / words' length, O rounded up to a vector]. For the gradient of
 * images, of the filters [C, 3, 3, O] of the convolution, mirrored. Its scratch is its output. */
struct winograd_filters {
    void *scratch;
    const void *filters; /* [O, 3, 3, C], or [C, 3, 3, O] */
    int64_t channels, outputs, is_for_gradient;
};

/* 3x3 convolution with stride 1, images padded with one pixel of zeros. */
struct winograd_convolve {
    void *out; /* [N, H, W, O] */
    const void *images, *filters; /* filters at the points */
    void *scratch;
    int64_t num_images, height, width, channels, outputs;
};

struct winograd_filter_gradient {
    void *out; /* [O, 3, 3, C] */
    const void *gradient, *images; /* gradient [N, H, W, O] */
    void *scratch;
    int64_t num_images, height, width, channels, outputs;
};

/* The gradient of the filters of a convolution with stride 1, an odd number of taps, and results as large as the
 * images; for bf16 alone. */
struct amx_filter_gradient {
    float *out; /* [O, K, K, C] */
    const void *gradient, *images; /* gradient [N, H, W, O] */
    void *scratch;
    int64_t num_images, height, width, channels, outputs, taps;
};

/* ---- Any batch, in floats: what has no faster kernel. ---- */

/* alpha times the matrix product of [M, K] and [K, L], plus beta times a matrix, which may be null. */
struct multiply {
    float *out; /* [M, L] */
    const float *left, *right, *base;
    void *scratch;
    int64_t rows, depth, columns, left_strides[2], right_strides[2], base_strides[2];
    double alpha, beta;
};

/* A matrix whose singular values are brought near 1 by Newton-Schulz iterations (see optimizer.py). It has no more rows
 * than columns. */
struct orthogonalize {
    float *out; /* [M, L] */
    const float *matrix;
    void *scratch;
    int64_t rows, columns, num_iterations, matrix_strides[2];
    double a, b, c;
};

/* Each number with one of another tensor or, where `right` is null, with a number. Strides of 0 repeat; the last
 * dimension is the one that the loop is over. */
struct combine {
    float *out;
    const float *left, *right;
    int64_t operation; /* ADD, SUBTRACT, MULTIPLY or DIVIDE */
    int64_t sizes[4], out_strides[4], left_strides[4], right_strides[4];
    double number, factor; /* factor: of what is added or subtracted */
};

/* The sum of the numbers in the middle of [M, K, L], or the greatest; not a number if one of them is not. */
struct reduce {
    float *out; /* [M, L] */
    const float *values;
    int64_t rows, depth, columns, takes_greatest;
};

/* The square root of the sum of squares. */
struct norm {
    float *out; /* [] */
    const float *values;
    int64_t count;
};

/* Images scaled to other sides, bilinear, smoothed where they become smaller. */
struct resize {
    float *out; /* [N, H', W', C] */
    const float *images;
    void *scratch;
    int64_t num_images, channels, height, width, out_height, out_width, image_strides[4];
};

/* Batch norm while it does not train, over all pixels [P, C]. */
struct batch_norm_inference {
    float *out;
    const float *values, *weight, *bias, *mean, *variance;
    void *scratch;
    int64_t num_pixels, channels;
    double epsilon;
};

/* A step of torch's SGD without dampening, for one parameter; momentum is null where there is none. */
struct sgd {
    float *parameter, *momentum;
    const float *gradient;
    int64_t count, is_nesterov;
    double learning_rate, factor, weight_decay; /* factor: of the momentum */
};
#endif
