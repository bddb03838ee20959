/* Attention in bfloat16, for processors with tiles (AMX), if Linux permits their use. */

#define _GNU_SOURCE
#include "_attention.h"

#if defined(__linux__) && defined(__x86_64__) && (__GNUC__ >= 11 || __clang_major__ >= 12)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILED __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")))

/* A tile is 16 rows of 64 bytes. A tile on the right of a product holds two matrix rows in each of its rows, (0, 1),
   (2, 3) and so on, with their channels interleaved. Sums are float32, in up to GROUP tiles at a time. */
enum { TILE_ROWS = 16, DEPTH = 32, TILE = TILE_ROWS * DEPTH, GROUP = 4 };

typedef uint16_t Bf16;

static inline __attribute__((always_inline)) TILED __m512i load_bf16(const Bf16 *from, int64_t count)
{
    return _mm512_maskz_loadu_epi16(count < DEPTH ? (1u << count) - 1 : (__mmask32)-1, from);
}

TILED static void store_bf16(Bf16 *to, __m512 values, int64_t count)
{
    _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)_mm512_cvtneps_pbh(values));
}

/* Lays out keys [tokens, dim] as tiles [32 channels, 16 tokens], `width` of them side by side, in panels of up to GROUP.
   Copies of the last token pad the last tile. */
TILED static void pack_keys(const Bf16 *from, int64_t stride, int64_t tokens, int64_t dim, int64_t width, Bf16 *tile)
{
    for (int64_t first = 0; first < width; first += GROUP)
        for (int64_t d = 0; d < dim; d += DEPTH)
            for (int64_t j = first; j < min(first + GROUP, width); j++, tile += TILE) {
                __m512 rows[TILE_ROWS];
#pragma GCC unroll 16
                for (int i = 0; i < TILE_ROWS; i++) {
                    int64_t token = min(j * TILE_ROWS + i, tokens - 1);
                    rows[i] = _mm512_castsi512_ps(load_bf16(from + token * stride + d, dim - d));
                }
                transpose(rows);
#pragma GCC unroll 16
                for (int i = 0; i < TILE_ROWS; i++)
                    _mm512_store_ps(tile + i * DEPTH, rows[i]);
            }
}

/* Interleaves the channels of a token with those of the next one. Channels and tokens past the end are 0. */
TILED static __m512i two_rows(const Bf16 *from, int64_t stride, int64_t rows, __mmask16 channels)
{
    __m512i one = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows > 0 ? channels : 0, from));
    __m512i next = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows > 1 ? channels : 0, from + stride));
    return _mm512_or_si512(one, _mm512_slli_epi32(next, 16));
}

/* Lays out values [tokens, dim] as tiles [32 tokens, 16 channels], `depth` of them below each other, in panels of up to
   GROUP. */
TILED static void pack_values(const Bf16 *from, int64_t stride, int64_t tokens, int64_t dim, int64_t depth, Bf16 *tile)
{
    for (int64_t width = ceil_div(dim, LANES), first = 0; first < width; first += GROUP)
        for (int64_t n = 0; n < depth * DEPTH; n += DEPTH)
            for (int64_t j = first; j < min(first + GROUP, width); j++, tile += TILE)
                for (int64_t i = 0; i < TILE_ROWS; i++) {
                    int64_t token = n + 2 * i, channel = j * LANES;
                    const Bf16 *at = from + token * stride + channel;
                    _mm512_store_si512(tile + i * DEPTH,
                                       two_rows(at, stride, tokens - token, first_lanes(dim - channel)));
                }
}

/* out [16, 16 * count] = left [16, 32 * depth] right [depth, count tiles]. `left_bytes` and `out_bytes` are the lengths
   of a row of `left` and `out`. */
static inline __attribute__((always_inline)) TILED void multiply(const Bf16 *left, int64_t left_bytes, const Bf16 *right,
                                                                 int64_t depth, const int count, float *out,
                                                                 int64_t out_bytes)
{
    /* The numbers of tiles must be compile-time constants. Tiles 0 to 3 hold the sums. */
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < depth; d++, left += DEPTH, right += count * TILE) {
        _tile_loadd(4, left, left_bytes);
        _tile_loadd(5, right, 64);
        _tile_dpbf16ps(0, 4, 5);
        if (count > 1) {
            _tile_loadd(6, right + TILE, 64);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (count > 2) {
            _tile_loadd(5, right + 2 * TILE, 64);
            _tile_dpbf16ps(2, 4, 5);
        }
        if (count > 3) {
            _tile_loadd(6, right + 3 * TILE, 64);
            _tile_dpbf16ps(3, 4, 6);
        }
    }
    _tile_stored(0, out, out_bytes);
    if (count > 1)
        _tile_stored(1, out + LANES, out_bytes);
    if (count > 2)
        _tile_stored(2, out + 2 * LANES, out_bytes);
    if (count > 3)
        _tile_stored(3, out + 3 * LANES, out_bytes);
}

/* out [16, 16 * width] = left [16, 32 * depth] right [depth, width tiles]. `right` is laid out in panels. */
TILED static void product(const Bf16 *left, const Bf16 *right, int64_t depth, int64_t width, float *out)
{
    int64_t left_bytes = depth * DEPTH * sizeof(Bf16), out_bytes = width * LANES * sizeof(float);
    for (int64_t first = 0; first < width; first += GROUP, right += GROUP * depth * TILE, out += GROUP * LANES)
        switch (min(GROUP, width - first)) {
        case 1:
            multiply(left, left_bytes, right, depth, 1, out, out_bytes);
            break;
        case 2:
            multiply(left, left_bytes, right, depth, 2, out, out_bytes);
            break;
        case 3:
            multiply(left, left_bytes, right, depth, 3, out, out_bytes);
            break;
        default:
            multiply(left, left_bytes, right, depth, GROUP, out, out_bytes);
        }
}

/* Turns one row of products into softmax weights, of which the largest is 1, and returns their sum before rounding.
   Powers of 2 come from a polynomial whose relative error, 1.0e-4, is a twentieth of that of rounding to bfloat16. */
TILED static float softmax_row(float *logits, const float *bias_row, float scale, int64_t vectors, Bf16 *weights)
{
    __m512 maximum = _mm512_set1_ps(LEAST), sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < vectors * LANES; j += LANES) {
        __m512 logit = _mm512_fmadd_ps(_mm512_load_ps(logits + j), _mm512_set1_ps(scale), _mm512_load_ps(bias_row + j));
        _mm512_store_ps(logits + j, logit);
        maximum = _mm512_max_ps(maximum, logit);
    }
    maximum = _mm512_set1_ps(_mm512_reduce_max_ps(maximum));
    for (int64_t j = 0; j < vectors * LANES; j += LANES) {
        __m512 rest = _mm512_sub_ps(_mm512_load_ps(logits + j), maximum), whole = split_exponent(&rest);
        __m512 power = _mm512_set1_ps(5.50089297e-2f);
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(2.42210972e-1f));
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(6.93282929e-1f));
        power = _mm512_scalef_ps(_mm512_fmadd_ps(power, rest, _mm512_set1_ps(1)), whole);
        sum = _mm512_add_ps(sum, power);
        store_bf16(weights + j, power, LANES);
    }
    return _mm512_reduce_add_ps(sum);
}

/* Sizes in tiles, and the bytes of workspace that each part takes. */
typedef struct {
    int64_t dim_depth, token_depth, token_width, dim_width;
    int64_t keys, values, weights, queries, logits, out_tile, bias_row;
} Sizes;

static Sizes sizes_of(const Problem *p)
{
    Sizes s = {.dim_depth = ceil_div(p->dim, DEPTH),
               .token_depth = ceil_div(p->tokens, DEPTH),
               .dim_width = ceil_div(p->dim, LANES)};
    s.token_width = 2 * s.token_depth;
    s.keys = s.dim_depth * s.token_width * TILE * sizeof(Bf16);
    s.values = s.token_depth * s.dim_width * TILE * sizeof(Bf16);
    s.weights = s.token_depth * TILE * sizeof(Bf16);
    s.queries = s.dim_depth * TILE * sizeof(Bf16);
    s.logits = s.token_width * TILE_ROWS * LANES * sizeof(float);
    s.out_tile = s.dim_width * TILE_ROWS * LANES * sizeof(float);
    s.bias_row = s.token_width * LANES * sizeof(float);
    return s;
}

static int64_t workspace_bytes(const Problem *p)
{
    Sizes s = sizes_of(p);
    return s.keys + s.values + s.weights + s.queries + s.logits + s.out_tile + s.bias_row;
}

TILED static void attend(const Problem *p, char *workspace)
{
    const Sizes s = sizes_of(p);
    Bf16 *keys = (Bf16 *)workspace, *values = (Bf16 *)(workspace += s.keys), *weights = (Bf16 *)(workspace += s.values);
    Bf16 *queries = (Bf16 *)(workspace += s.weights);
    float *logits = (float *)(workspace += s.queries), *out_tile = (float *)(workspace += s.logits);
    float *bias_row = (float *)(workspace += s.out_tile);
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_a_row[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++)
        tiles.bytes_a_row[i] = DEPTH * sizeof(Bf16), tiles.rows[i] = TILE_ROWS;
    _tile_loadconfig(&tiles);
    for (int64_t image = 0; image < p->batch; image++) {
        fill_bias_row(p, image, bias_row, s.token_width * LANES);
        for (int64_t head = 0; head < p->heads; head++) {
            const Bf16 *head_queries = (const Bf16 *)p->queries + offset(p->query_strides, image, head);
            const Bf16 *head_keys = (const Bf16 *)p->keys + offset(p->key_strides, image, head);
            pack_keys(head_keys, p->key_strides.token, p->tokens, p->dim, s.token_width, keys);
            const Bf16 *head_values = (const Bf16 *)p->values + offset(p->value_strides, image, head);
            pack_values(head_values, p->value_strides.token, p->tokens, p->dim, s.token_depth, values);
            for (int64_t row = 0; row < p->rows; row += TILE_ROWS) {
                /* Copies of the last query pad the last tile. */
                for (int64_t i = 0; i < TILE_ROWS; i++)
                    for (int64_t d = 0; d < s.dim_depth * DEPTH; d += DEPTH) {
                        const Bf16 *query = head_queries + min(row + i, p->rows - 1) * p->query_strides.token + d;
                        _mm512_store_si512(queries + i * s.dim_depth * DEPTH + d, load_bf16(query, p->dim - d));
                    }
                product(queries, keys, s.dim_depth, s.token_width, logits);
                float sums[TILE_ROWS];
                for (int64_t i = 0; i < TILE_ROWS; i++)
                    sums[i] = softmax_row(logits + i * s.token_width * LANES, bias_row, p->scale * LOG2_E, s.token_width,
                                          weights + i * s.token_depth * DEPTH);
                product(weights, values, s.token_depth, s.dim_width, out_tile);
                for (int64_t i = 0; i < min(TILE_ROWS, p->rows - row); i++)
                    for (int64_t d = 0; d < s.dim_width * LANES; d += LANES) {
                        Bf16 *out = (Bf16 *)p->out + out_offset(p, image, head, row + i) + d;
                        __m512 mean = _mm512_load_ps(out_tile + i * s.dim_width * LANES + d);
                        store_bf16(out, _mm512_mul_ps(mean, _mm512_set1_ps(1 / sums[i])), p->dim - d);
                    }
            }
        }
    }
    _tile_release();
}

static int is_supported(void)
{
    /* AMX-BF16 and AMX-TILE, by CPUID: some versions of clang compile AMX, but don't know the names of its features. */
    const unsigned int tiles = 1u << 22 | 1u << 24;
    unsigned int a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tiles) != tiles)
        return 0;
    /* Linux lets a process use tiles after it has requested them (arch_prctl(2): ARCH_REQ_XCOMP_PERM for XTILEDATA). */
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

const Kernel bfloat16_kernel = {is_supported, workspace_bytes, attend};

#else

const Kernel bfloat16_kernel = {0};

#endif
