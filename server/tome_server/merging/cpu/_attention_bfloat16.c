/* Attention in bfloat16, where the processor has tiles (AMX) and Linux gives them. */

#define _GNU_SOURCE
#include "_attention.h"

#if defined(__linux__) && defined(__x86_64__) && (__GNUC__ >= 11 || __clang_major__ >= 12)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILED __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")))

/* A tile is 16 rows of 64 bytes. That on a product's right has two rows in each: (0, 1), (2, 3) and so on, channel by
   channel. Its sums are floats, and up to GROUP tiles of them are added to at once. */
enum { TILE_ROWS = 16, DEPTH = 32, TILE = TILE_ROWS * DEPTH, GROUP = 4 };

typedef uint16_t Half;

static inline __attribute__((always_inline)) TILED __m512i load_halves(const Half *from, int64_t count)
{
    return _mm512_maskz_loadu_epi16(count < DEPTH ? (1u << count) - 1 : (__mmask32)-1, from);
}

TILED static void store_halves(Half *to, __m512 values, int64_t count)
{
    _mm256_mask_storeu_epi16(to, first_16(count), (__m256i)_mm512_cvtneps_pbh(values));
}

/* Lays out keys [tokens, dim] as tiles [dim, 16 tokens], so many across, in panels of up to GROUP. Copies fill them up. */
TILED static void lay_out_keys(const Half *from, int64_t apart, int64_t tokens, int64_t dim, int64_t across, Half *tile)
{
    for (int64_t first = 0; first < across; first += GROUP)
        for (int64_t d = 0; d < dim; d += DEPTH)
            for (int64_t j = first; j < least(first + GROUP, across); j++, tile += TILE) {
                __m512 rows[TILE_ROWS];
#pragma GCC unroll 16
                for (int i = 0; i < TILE_ROWS; i++) {
                    int64_t token = least(j * TILE_ROWS + i, tokens - 1);
                    rows[i] = _mm512_castsi512_ps(load_halves(from + token * apart + d, dim - d));
                }
                transpose(rows);
#pragma GCC unroll 16
                for (int i = 0; i < TILE_ROWS; i++)
                    _mm512_store_ps(tile + i * DEPTH, rows[i]);
            }
}

/* One channel after another of a token and of the next; 0 where there is none. */
TILED static __m512i two_rows(const Half *from, int64_t apart, int64_t rows, __mmask16 channels)
{
    __m512i one = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows > 0 ? channels : 0, from));
    __m512i next = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows > 1 ? channels : 0, from + apart));
    return _mm512_or_si512(one, _mm512_slli_epi32(next, 16));
}

/* Lays out values [tokens, dim] as tiles [32 tokens, 16 channels], so many deep, in panels of up to GROUP. */
TILED static void lay_out_values(const Half *from, int64_t apart, int64_t tokens, int64_t dim, int64_t deep, Half *tile)
{
    for (int64_t across = parts(dim, LANES), first = 0; first < across; first += GROUP)
        for (int64_t n = 0; n < deep * DEPTH; n += DEPTH)
            for (int64_t j = first; j < least(first + GROUP, across); j++, tile += TILE)
                for (int64_t i = 0; i < TILE_ROWS; i++) {
                    int64_t token = n + 2 * i, channel = j * LANES;
                    const Half *at = from + token * apart + channel;
                    _mm512_store_si512(tile + i * DEPTH,
                                       two_rows(at, apart, tokens - token, first_16(dim - channel)));
                }
}

/* out [16, 16 * count] = left [16, 32 * depth] right [depth, count tiles]; `out` and `left` have rows of so many bytes */
static inline __attribute__((always_inline)) TILED void multiply(const Half *left, int64_t left_bytes, const Half *right,
                                                                 int64_t depth, const int count, float *out,
                                                                 int64_t out_bytes)
{
    /* Tiles go by numbers that are known when this is compiled: 0 to 3 have the sums. */
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

/* out [16, 16 * across] = left [16, 32 * depth] right [depth, across tiles], of which `right` is laid out in panels */
TILED static void product(const Half *left, const Half *right, int64_t depth, int64_t across, float *out)
{
    int64_t left_bytes = depth * DEPTH * sizeof(Half), out_bytes = across * LANES * sizeof(float);
    for (int64_t first = 0; first < across; first += GROUP, right += GROUP * depth * TILE, out += GROUP * LANES)
        switch (least(GROUP, across - first)) {
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

/* Turns products into weights, of which the largest is 1, and returns their sum before they are rounded. The polynomial's
   relative error, 1.0e-4, is a twentieth of that. */
TILED static float weigh(float *logits, const float *raised, float scale, int64_t vectors, Half *weights)
{
    __m512 most = _mm512_set1_ps(LEAST), sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < vectors * LANES; j += LANES) {
        __m512 logit = _mm512_fmadd_ps(_mm512_load_ps(logits + j), _mm512_set1_ps(scale), _mm512_load_ps(raised + j));
        _mm512_store_ps(logits + j, logit);
        most = _mm512_max_ps(most, logit);
    }
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t j = 0; j < vectors * LANES; j += LANES) {
        __m512 rest = _mm512_sub_ps(_mm512_load_ps(logits + j), most), whole = whole_of(&rest);
        __m512 power = _mm512_set1_ps(5.50089297e-2f);
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(2.42210972e-1f));
        power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(6.93282929e-1f));
        power = _mm512_scalef_ps(_mm512_fmadd_ps(power, rest, _mm512_set1_ps(1)), whole);
        sum = _mm512_add_ps(sum, power);
        store_halves(weights + j, power, LANES);
    }
    return _mm512_reduce_add_ps(sum);
}

/* Sizes in tiles, and how many bytes of room each part takes. */
typedef struct {
    int64_t deep, pairs, across, wide;
    int64_t keys, values, weights, queries, logits, found, raised;
} Halves;

static Halves halves(const Problem *p)
{
    Halves h = {.deep = parts(p->dim, DEPTH), .pairs = parts(p->tokens, DEPTH), .wide = parts(p->dim, LANES)};
    h.across = 2 * h.pairs;
    h.keys = h.deep * h.across * TILE * sizeof(Half);
    h.values = h.pairs * h.wide * TILE * sizeof(Half);
    h.weights = h.pairs * TILE * sizeof(Half);
    h.queries = h.deep * TILE * sizeof(Half);
    h.logits = h.across * TILE_ROWS * LANES * sizeof(float);
    h.found = h.wide * TILE_ROWS * LANES * sizeof(float);
    h.raised = h.across * LANES * sizeof(float);
    return h;
}

static int64_t room_for(const Problem *p)
{
    Halves h = halves(p);
    return h.keys + h.values + h.weights + h.queries + h.logits + h.found + h.raised;
}

TILED static void attend(const Problem *p, char *room)
{
    const Halves h = halves(p);
    Half *keys = (Half *)room, *values = (Half *)(room += h.keys), *weights = (Half *)(room += h.values);
    Half *queries = (Half *)(room += h.weights);
    float *logits = (float *)(room += h.queries), *found = (float *)(room += h.logits);
    float *raised = (float *)(room += h.found);
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_a_row[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++)
        tiles.bytes_a_row[i] = DEPTH * sizeof(Half), tiles.rows[i] = TILE_ROWS;
    _tile_loadconfig(&tiles);
    for (int64_t image = 0; image < p->batch; image++) {
        raise_logits(p, image, raised, h.across * LANES);
        for (int64_t head = 0; head < p->heads; head++) {
            const Half *asking = (const Half *)p->queries + place(p->of_queries, image, head);
            lay_out_keys((const Half *)p->keys + place(p->of_keys, image, head), p->of_keys.token, p->tokens, p->dim,
                         h.across, keys);
            lay_out_values((const Half *)p->values + place(p->of_values, image, head), p->of_values.token, p->tokens,
                           p->dim, h.pairs, values);
            for (int64_t row = 0; row < p->rows; row += TILE_ROWS) {
                /* Rows that there are not are copies of the last. */
                for (int64_t i = 0; i < TILE_ROWS; i++)
                    for (int64_t d = 0; d < h.deep * DEPTH; d += DEPTH) {
                        const Half *query = asking + least(row + i, p->rows - 1) * p->of_queries.token + d;
                        _mm512_store_si512(queries + i * h.deep * DEPTH + d, load_halves(query, p->dim - d));
                    }
                product(queries, keys, h.deep, h.across, logits);
                float sums[TILE_ROWS];
                for (int64_t i = 0; i < TILE_ROWS; i++)
                    sums[i] = weigh(logits + i * h.across * LANES, raised, p->scale * PER_NAT, h.across,
                                    weights + i * h.pairs * DEPTH);
                product(weights, values, h.pairs, h.wide, found);
                for (int64_t i = 0; i < least(TILE_ROWS, p->rows - row); i++)
                    for (int64_t d = 0; d < h.wide * LANES; d += LANES) {
                        Half *out = (Half *)p->out + place_out(p, image, head, row + i) + d;
                        __m512 mean = _mm512_load_ps(found + i * h.wide * LANES + d);
                        store_halves(out, _mm512_mul_ps(mean, _mm512_set1_ps(1 / sums[i])), p->dim - d);
                    }
            }
        }
    }
    _tile_release();
}

static int is_supported(void)
{
    /* By CPUID, since not every clang that compiles them knows the names of AMX's parts: AMX-BF16 and AMX-TILE. */
    const unsigned int tiles = 1u << 22 | 1u << 24;
    unsigned int a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tiles) != tiles)
        return 0;
    /* Linux gives tiles to processes that ask for them (arch_prctl(2): ARCH_REQ_XCOMP_PERM, of XTILEDATA). */
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

const Way in_half = {is_supported, room_for, attend};

#else

const Way in_half = {0};

#endif
