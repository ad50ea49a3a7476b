/* The gradient of a convolution's filters by AMX: 16 rows times 16 columns of 32 numbers of 16 bits, summed in floats.
 *
 * Images and gradients are laid on planes with zeros right of and below each image, so that each tap of the convolution
 * is a distance between pixels. Tiles hold pixels in pairs; for odd distances the images are paired a second way. */
enum {
    WORDS = 256,       /* of 32 bits in a tile */
    MOST_PIXELS = 288, /* of planes at a time: their tiles stay in a core's first cache */
    MOST_CHANNELS = 128 /* of the images at a time: their sums stay in its second */
};

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* How it goes about it: how much at a time, and where in its memory what stands, in bytes. */
typedef struct {
    int64_t images, tiles, before, pairs, blocks, outputs;
    size_t pairs_at[2], gradients_at, pixels_at, gradient_pixels_at, zeros_at, end;
} tile_plan;

static tile_plan plan_tiles(int64_t height, int64_t width, int64_t channels, int64_t outputs, int64_t taps) {
    tile_plan plan;
    const int64_t pad = taps / 2, plane = (height + pad) * (width + pad);
    plan.images = plane < MOST_PIXELS ? MOST_PIXELS / plane : 1;
    plan.tiles = (plan.images * plane + 31) / 32;
    plan.before = pad * (width + pad) + pad; /* zeros above the first image and left of it */
    plan.pairs = plan.tiles * 16 + plan.before;
    plan.blocks = (channels < MOST_CHANNELS ? channels + 31 : MOST_CHANNELS) / 32 * 2; /* of 16 channels */
    plan.outputs = outputs / AMX_OUTPUTS;
    const size_t paired = (size_t)(plan.blocks * plan.pairs * 64);
    plan.pairs_at[0] = (size_t)(plan.outputs * taps * taps * plan.blocks) * 2 * WORDS * 4; /* after the sums */
    plan.pairs_at[1] = plan.pairs_at[0] + paired;
    plan.gradients_at = plan.pairs_at[1] + paired;
    plan.pixels_at = plan.gradients_at + (size_t)(plan.outputs * 2 * plan.tiles) * WORDS * 4;
    plan.gradient_pixels_at = plan.pixels_at + (size_t)(2 * plan.pairs + 1) * sizeof(bf16 *);
    plan.zeros_at = plan.gradient_pixels_at + (size_t)(plan.tiles * 32) * sizeof(bf16 *);
    plan.end = (plan.zeros_at + (size_t)(channels > outputs ? channels : outputs) * 2 + 63) / 64 * 64;
    return plan;
}

/* Where each pixel of some images' planes is; `zeros` where there is none. */
static void find_pixels(const bf16 **pixels, int64_t num_pixels, int64_t before, const bf16 *images, int64_t number,
                        int64_t height, int64_t width, int64_t channels, int64_t pad, const bf16 *zeros) {
    for (int64_t i = 0; i < num_pixels; i++) pixels[i] = zeros;
    for (int64_t row = 0; row < number * height; row++)
        for (int64_t x = 0; x < width; x++)
            pixels[before + (row + row / height * pad) * (width + pad) + x] = images + (row * width + x) * channels;
}

/* A pixel's channels, up to 16 of them, each in 32 bits. */
INLINE __m512i load_channels(const bf16 *channels, int64_t count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)((1 << count) - 1), channels));
}

INLINE __m512i pair(__m512i first, __m512i second) { return _mm512_or_si512(first, _mm512_slli_epi32(second, 16)); }

/* Tiles of images, 16 pairs of pixels by 16 channels: pairs that begin with an even pixel, and with an odd one. */
static void pack_images(uint32_t *even, uint32_t *odd, const bf16 **pixels, int64_t pairs, int64_t first,
                        int64_t channels) {
    for (int64_t c = 0; c < channels; c += 16) {
        const int64_t count = channels - c < 16 ? channels - c : 16;
        __m512i pixel = load_channels(pixels[0] + first + c, count);
        for (int64_t p = 0; p < pairs; p++, even += 16, odd += 16) {
            const __m512i second = load_channels(pixels[2 * p + 1] + first + c, count);
            const __m512i third = load_channels(pixels[2 * p + 2] + first + c, count);
            _mm512_storeu_si512(even, pair(pixel, second));
            _mm512_storeu_si512(odd, pair(second, third));
            pixel = third;
        }
    }
}

/* Tiles of gradients, 16 channels by 16 pairs of pixels: pairs by channels, transposed. */
static void pack_gradients(uint32_t *to, const bf16 **pixels, int64_t tiles, int64_t first) {
    for (; tiles; tiles--, pixels += 32, to += WORDS) {
        __m512i rows[16], halves[16];
        UNROLL for (int i = 0; i < 16; i++)
            rows[i] = pair(load_channels(pixels[2 * i] + first, 16), load_channels(pixels[2 * i + 1] + first, 16));
        UNROLL for (int i = 0; i < 16; i += 2) {
            halves[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            halves[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        UNROLL for (int i = 0; i < 8; i++) { /* now blocks of 4 by 4 words are transposed */
            const int from = i / 2 * 4 + i % 2;
            rows[2 * i] = _mm512_unpacklo_epi64(halves[from], halves[from + 2]);
            rows[2 * i + 1] = _mm512_unpackhi_epi64(halves[from], halves[from + 2]);
        }
        UNROLL for (int i = 0; i < 4; i++) {
            const __m512i even_left = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
            const __m512i even_right = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
            const __m512i odd_left = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
            const __m512i odd_right = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
            _mm512_storeu_si512(to + i * 16, _mm512_shuffle_i32x4(even_left, even_right, 0x88));
            _mm512_storeu_si512(to + (4 + i) * 16, _mm512_shuffle_i32x4(odd_left, odd_right, 0x88));
            _mm512_storeu_si512(to + (8 + i) * 16, _mm512_shuffle_i32x4(even_left, even_right, 0xdd));
            _mm512_storeu_si512(to + (12 + i) * 16, _mm512_shuffle_i32x4(odd_left, odd_right, 0xdd));
        }
    }
}

/* Adds to 2 x 2 tiles of sums the products of two rows of tiles with two others. */
INLINE void multiply_tiles(float *sums, const uint32_t *left, int64_t left_step, const uint32_t *right,
                           int64_t right_step, int64_t tiles) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + WORDS, 64);
    _tile_loadd(2, sums + 2 * WORDS, 64);
    _tile_loadd(3, sums + 3 * WORDS, 64);
    for (; tiles; tiles--, left += WORDS, right += WORDS) {
        _tile_loadd(4, left, 64);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + right_step, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + left_step, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + WORDS, 64);
    _tile_stored(2, sums + 2 * WORDS, 64);
    _tile_stored(3, sums + 3 * WORDS, 64);
}

int64_t amx_filter_gradient_scratch_bf16(const struct amx_filter_gradient *a) {
    return (int64_t)plan_tiles(a->height, a->width, a->channels, a->outputs, a->taps).end;
}

void amx_filter_gradient_bf16(const struct amx_filter_gradient *a) {
    const int64_t number = a->num_images, height = a->height, width = a->width, channels = a->channels;
    const int64_t outputs = a->outputs, taps = a->taps, pad = taps / 2;
    const tile_plan plan = plan_tiles(height, width, channels, outputs, taps);
    char *memory = a->scratch;
    float *sums = (float *)memory, *out = a->out;
    uint32_t *pairs[2] = {(uint32_t *)(memory + plan.pairs_at[0]), (uint32_t *)(memory + plan.pairs_at[1])};
    uint32_t *gradients = (uint32_t *)(memory + plan.gradients_at);
    const bf16 **pixels = (const bf16 **)(memory + plan.pixels_at);
    const bf16 **gradient_pixels = (const bf16 **)(memory + plan.gradient_pixels_at);
    const bf16 *zeros = (const bf16 *)(memory + plan.zeros_at);
    tile_shapes shapes = {.palette = 1}, others;
    for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;
    _tile_storeconfig(&others);
    _tile_loadconfig(&shapes);
    memset(memory + plan.zeros_at, 0, plan.end - plan.zeros_at);
    for (int64_t first = 0; first < channels; first += MOST_CHANNELS) {
        const int64_t some = channels - first < MOST_CHANNELS ? channels - first : MOST_CHANNELS;
        memset(memory, 0, plan.gradients_at);
        for (int64_t n = 0; n < number; n += plan.images) {
            const int64_t now = number - n < plan.images ? number - n : plan.images, at = n * height * width;
            find_pixels(pixels, 2 * plan.pairs + 1, plan.before, (const bf16 *)a->images + at * channels, now, height,
                        width, channels, pad, zeros);
            find_pixels(gradient_pixels, plan.tiles * 32, 0, (const bf16 *)a->gradient + at * outputs, now, height, width,
                        outputs, pad, zeros);
            pack_images(pairs[0], pairs[1], pixels, plan.pairs, first, some);
            for (int64_t o = 0; o < outputs; o += 16)
                pack_gradients(gradients + o / 16 * plan.tiles * WORDS, gradient_pixels, plan.tiles, o);
            float *to = sums;
            for (int64_t o = 0; o < outputs; o += 32)
                for (int64_t c = 0; c < some; c += 32)
                    for (int64_t tap = 0; tap < taps * taps; tap++, to += 4 * WORDS) {
                        const int64_t distance = tap / taps * (width + pad) + tap % taps;
                        multiply_tiles(to, gradients + o / 16 * plan.tiles * WORDS, plan.tiles * WORDS,
                                       pairs[distance % 2] + (c / 16 * plan.pairs + distance / 2) * 16,
                                       plan.pairs * 16, plan.tiles);
                    }
        }
        const float *from = sums;
        for (int64_t o = 0; o < outputs; o += 32)
            for (int64_t c = first; c < first + some; c += 32)
                for (int64_t tap = 0; tap < taps * taps; tap++, from += 4 * WORDS)
                    for (int64_t i = 0; i < 32; i++)
                        for (int64_t j = 0; j < 32 && c + j < channels; j++)
                            out[((o + i) * taps * taps + tap) * channels + c + j] =
                                from[(i / 16 * 2 + j / 16) * WORDS + i % 16 * 16 + j % 16];
    }
    _tile_loadconfig(&others);
}
