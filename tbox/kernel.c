/* The hot loops of decode and edge, for a processor: what numpy does in some sixty passes over a batch is done
 * here in a few. Each function has a twin in numpy beside its caller, which it equals to the last bit; a machine
 * without a compiler runs the twins. Nothing here allocates, keeps state, or knows what a signal means.
 *
 * Arrays come through the buffer protocol, C-contiguous. Their lengths are checked against each other (ValueError),
 * and every index before it is used (IndexError): a broken table must not lead out of memory.
 *
 * To be compiled without contraction of a * b + c, which would round once where Python rounds twice.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian processors; elsewhere numpy does it"
#endif

enum { FRAME_BYTES = 72, LENGTH_AT = 4, DATA_AT = 8, DATA_BYTES = 64, LAST_WORD_AT = 64, VIEWS_MAX = 24 };
enum { VALID = 0, CRC = 4, COUNTER = 5, DUPLICATE = 6 }; /* model.Validity */
enum { UNKNOWN_PLAN = 0, MALFORMED_PLAN = 1 };           /* decode/table.py */
static const int64_t NEVER_NS = -(INT64_C(1) << 62);

/* --- arguments --------------------------------------------------------------------------------------- */

typedef struct {
    Py_buffer view[VIEWS_MAX];
    int64_t number[VIEWS_MAX];
    double real[VIEWS_MAX];
    int count;
} Arguments;

static void close_arguments(Arguments *a, const char *kinds)
{
    for (int i = 0; i < a->count; i++)
        if (kinds[i] == 'r' || kinds[i] == 'w') PyBuffer_Release(&a->view[i]);
}

/* kinds: a letter for each argument: r a buffer to read, w one to write, i an integer, d a float. */
static bool open_arguments(Arguments *a, const char *kinds, PyObject *const *args, Py_ssize_t given)
{
    a->count = 0;
    if (given != (Py_ssize_t)strlen(kinds)) {
        PyErr_Format(PyExc_TypeError, "%zd arguments, not %zu", given, strlen(kinds));
        return false;
    }
    for (; a->count < given; a->count++) {
        int i = a->count;
        bool failed;
        if (kinds[i] == 'i') {
            a->number[i] = PyLong_AsLongLong(args[i]);
            failed = a->number[i] == -1 && PyErr_Occurred();
        } else if (kinds[i] == 'd') {
            a->real[i] = PyFloat_AsDouble(args[i]);
            failed = a->real[i] == -1.0 && PyErr_Occurred();
        } else {
            int flags = kinds[i] == 'w' ? PyBUF_WRITABLE : PyBUF_SIMPLE;
            failed = PyObject_GetBuffer(args[i], &a->view[i], flags) < 0;
        }
        if (failed) {
            close_arguments(a, kinds);
            return false;
        }
    }
    return true;
}

/* Whether argument i holds at least `items` of `size` bytes; sets the error where it does not. */
static bool holds(const Arguments *a, int i, int64_t items, size_t size)
{
    if (items >= 0 && a->view[i].len / (Py_ssize_t)size >= items) return true;
    PyErr_Format(PyExc_ValueError, "argument %d holds %zd bytes, not %lld of %zu", i, a->view[i].len,
                 (long long)items, size);
    return false;
}

static inline bool in(int64_t index, int64_t size) { return index >= 0 && index < size; }

static bool inside_of(const char *what, bool is)
{
    if (!is) PyErr_Format(PyExc_IndexError, "a %s leads out of its table", what);
    return is;
}

#define ARRAY(type, i) ((type *)a.view[i].buf)
#define ITEMS(type, i) ((int64_t)(a.view[i].len / (Py_ssize_t)sizeof(type)))

/* --- decode ------------------------------------------------------------------------------------------ */

static inline uint64_t word_at(const uint8_t *place, bool big)
{
    uint64_t word;
    memcpy(&word, place, sizeof word);
    return big ? __builtin_bswap64(word) : word;
}

static int64_t find(const uint32_t *keys, int64_t size, uint32_t key)
{
    int64_t low = 0, high = size;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (keys[middle] < key) low = middle + 1;
        else high = middle;
    }
    return low < size && keys[low] == key ? low : -1;
}

/* What kernel.py's PLAN and ROW say: a signal's bits and meaning in one cache line. */
typedef struct {
    int32_t start, count, selector_row, selector_base, selector_size;
    uint8_t length, needs;
} Plan;

typedef struct {
    uint64_t mask, half;
    int64_t low;
    uint64_t span;
    double scale, add;
    int32_t column;
    uint8_t byte, shift, big, need_bytes;
} Row;

static inline uint64_t bits_of(const Row *row, const uint8_t *frame)
{
    return word_at(frame + row->byte, row->big) >> row->shift & row->mask;
}

static inline int64_t raw_of(const Row *row, const uint8_t *frame)
{
    return (int64_t)((bits_of(row, frame) ^ row->half) - row->half);
}

static inline bool lies_in_a_frame(const Row *row)
{
    return (row->byte <= LAST_WORD_AT && row->shift < 64) || inside_of("row", false);
}

/* Whether a plan's rows are in the table and fit the room that is left; sets the error where not. */
static bool fits(const Plan *plan, int64_t rows, int64_t room)
{
    int64_t first = plan->start, size = plan->count;
    return !size || inside_of("plan", in(first, rows) && in(size - 1, rows - first) && size <= room);
}

/* plans(frames, keys, roots, plans, rows, selector_plan, plan out, short out)
 *     -> (samples, needs, frames unknown, frames malformed, frames short)
 * The plan each frame ends in: by id, then by its selectors until none is left or the payload ends before one. */
static const char PLANS[] = "rrrrrrww";
static PyObject *plans(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Arguments a;
    (void)self;
    if (!open_arguments(&a, PLANS, args, given)) return NULL;
    const uint8_t *frame = ARRAY(uint8_t, 0);
    const uint32_t *keys = ARRAY(uint32_t, 1);
    const int64_t *roots = ARRAY(int64_t, 2), *selector_plan = ARRAY(int64_t, 5);
    const Plan *table = ARRAY(Plan, 3);
    const Row *row = ARRAY(Row, 4);
    int64_t *plan = ARRAY(int64_t, 6);
    uint8_t *is_short = ARRAY(uint8_t, 7);
    int64_t frames = a.view[0].len / FRAME_BYTES, ids = ITEMS(uint32_t, 1), size = ITEMS(Plan, 3);
    int64_t rows = ITEMS(Row, 4), targets = ITEMS(int64_t, 5);
    int64_t samples = 0, unknown = 0, malformed = 0, shorts = 0;
    int needs = 0;
    PyObject *result = NULL;
    if (!holds(&a, 2, ids, 8) || !holds(&a, 6, frames, 8) || !holds(&a, 7, frames, 1))
        goto done;
    for (int64_t i = 0; i < frames; i++, frame += FRAME_BYTES) {
        uint32_t id;
        memcpy(&id, frame, sizeof id);
        int64_t at = find(keys, ids, id), p = at < 0 ? UNKNOWN_PLAN : roots[at];
        for (int64_t turns = 0;; turns++) {
            if (!inside_of("plan", in(p, size) && turns < size)) goto done;
            int64_t selector = table[p].selector_row;
            if (selector < 0) break;
            if (!inside_of("selector", selector < rows) || !lies_in_a_frame(row + selector)) goto done;
            if (row[selector].need_bytes > frame[LENGTH_AT]) break;
            uint64_t value = bits_of(row + selector, frame), last = (uint64_t)(int64_t)table[p].selector_size;
            int64_t target = table[p].selector_base + (int64_t)(value < last ? value : last);
            if (!inside_of("selector", in(target, targets))) goto done;
            p = selector_plan[target];
        }
        plan[i] = p;
        is_short[i] = frame[LENGTH_AT] < table[p].length;
        unknown += p == UNKNOWN_PLAN;
        malformed += p == MALFORMED_PLAN;
        shorts += is_short[i];
        samples += table[p].count;
        needs |= table[p].needs;
    }
    result = Py_BuildValue("(LiLLL)", (long long)samples, needs, (long long)unknown, (long long)malformed,
                           (long long)shorts);
done:
    close_arguments(&a, PLANS);
    return result;
}

/* decode(frames, t_ns, plan, plans, rows, value out, column out, t_ns out)
 *     -> (samples, whether low <= raw <= low + span for all)
 * The samples of every frame, in the order of the plan's rows; rows beyond the payload's end are left out.
 * value = raw * scale + add, with raw an int64 whatever the row's kind. */
static const char DECODE[] = "rrrrrwww";
static PyObject *decode(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Arguments a;
    (void)self;
    if (!open_arguments(&a, DECODE, args, given)) return NULL;
    const uint8_t *frame = ARRAY(uint8_t, 0);
    const int64_t *t_ns = ARRAY(int64_t, 1), *plan = ARRAY(int64_t, 2);
    const Plan *table = ARRAY(Plan, 3);
    const Row *rows = ARRAY(Row, 4);
    double *value_out = ARRAY(double, 5);
    int64_t *column_out = ARRAY(int64_t, 6), *t_out = ARRAY(int64_t, 7);
    int64_t frames = a.view[0].len / FRAME_BYTES, room = ITEMS(double, 5), k = 0;
    bool outside = false;
    PyObject *result = NULL;
    if (!holds(&a, 1, frames, 8) || !holds(&a, 2, frames, 8) || !holds(&a, 6, room, 8) || !holds(&a, 7, room, 8))
        goto done;
    for (int64_t i = 0; i < frames; i++, frame += FRAME_BYTES) {
        if (!inside_of("plan", in(plan[i], ITEMS(Plan, 3)))) goto done;
        const Plan *one = table + plan[i];
        if (!fits(one, ITEMS(Row, 4), room - k)) goto done;
        for (const Row *row = rows + one->start, *end = row + one->count; row < end; row++) {
            if (row->need_bytes > frame[LENGTH_AT]) continue;
            if (!lies_in_a_frame(row)) goto done;
            int64_t raw = raw_of(row, frame);
            outside |= (uint64_t)raw - (uint64_t)row->low > row->span;
            double value = (double)raw * row->scale;
            value_out[k] = value + row->add;
            column_out[k] = row->column;
            t_out[k++] = t_ns[i];
        }
    }
    result = Py_BuildValue("(LO)", (long long)k, outside ? Py_False : Py_True);
done:
    close_arguments(&a, DECODE);
    return result;
}

/* details(frames, plan, plans, rows, frame out, row out, raw out)
 *     -> samples: where each sample of decode came from, and its raw value */
static const char DETAILS[] = "rrrrwww";
static PyObject *details(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Arguments a;
    (void)self;
    if (!open_arguments(&a, DETAILS, args, given)) return NULL;
    const uint8_t *frame = ARRAY(uint8_t, 0);
    const int64_t *plan = ARRAY(int64_t, 1);
    const Plan *table = ARRAY(Plan, 2);
    const Row *rows = ARRAY(Row, 3);
    int64_t *frame_out = ARRAY(int64_t, 4), *row_out = ARRAY(int64_t, 5), *raw_out = ARRAY(int64_t, 6);
    int64_t frames = a.view[0].len / FRAME_BYTES, room = ITEMS(int64_t, 4), k = 0;
    PyObject *result = NULL;
    if (!holds(&a, 1, frames, 8) || !holds(&a, 5, room, 8) || !holds(&a, 6, room, 8))
        goto done;
    for (int64_t i = 0; i < frames; i++, frame += FRAME_BYTES) {
        if (!inside_of("plan", in(plan[i], ITEMS(Plan, 2)))) goto done;
        const Plan *one = table + plan[i];
        if (!fits(one, ITEMS(Row, 3), room - k)) goto done;
        for (int64_t n = one->start; n < one->start + one->count; n++) {
            if (rows[n].need_bytes > frame[LENGTH_AT]) continue;
            if (!lies_in_a_frame(rows + n)) goto done;
            frame_out[k] = i;
            row_out[k] = n;
            raw_out[k++] = raw_of(rows + n, frame);
        }
    }
    result = PyLong_FromLongLong(k);
done:
    close_arguments(&a, DETAILS);
    return result;
}

/* calm(column, value, believed, half_step) -> whether no value is further than half a step from the one believed;
 * then they are believed. */
static const char CALM[] = "rrwr";
static PyObject *calm(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Arguments a;
    (void)self;
    if (!open_arguments(&a, CALM, args, given)) return NULL;
    const int64_t *column = ARRAY(int64_t, 0);
    const double *value = ARRAY(double, 1), *half_step = ARRAY(double, 3);
    double *believed = ARRAY(double, 2);
    int64_t k = ITEMS(int64_t, 0), columns = ITEMS(double, 2);
    PyObject *result = NULL;
    if (!holds(&a, 1, k, 8) || !holds(&a, 3, columns, 8)) goto done;
    bool all = true;
    for (int64_t i = 0; i < k; i++) {
        if (!inside_of("column", in(column[i], columns))) goto done;
        all &= fabs(value[i] - believed[column[i]]) <= half_step[column[i]];
    }
    for (int64_t i = 0; all && i < k; i++)
        believed[column[i]] = value[i];
    result = PyBool_FromLong(all);
done:
    close_arguments(&a, CALM);
    return result;
}

/* guard(frames, t_ns, plan, short, message_of, byte, shift, mask, big, crc_base, crc_table, crc_constant, has_crc,
 *       has_counter, modulo, last, last_ns, last_payload, lost, code out, gap_ns) -> (frames refused, frames lost)
 * Frames against CRC and alive counter. byte, shift, mask, big: the CRC of each of the m messages, then the counter
 * of each. crc_base: (m, w) where in crc_table the values of a payload byte begin. last, last_ns, last_payload:
 * what each message brought last; lost: how many of its frames must have been lost. code: (frames,) model.Validity. */
static const char GUARD[] = "rrrrrrrrrrrrrrrwwwwwi";

typedef struct {
    const int64_t *byte;
    const uint64_t *shift, *mask;
    const uint8_t *big;
} Fields;

static inline int64_t field(const Fields *f, const uint8_t *payload, int64_t n)
{
    return (int64_t)((word_at(payload + f->byte[n], f->big[n]) >> f->shift[n]) & f->mask[n]);
}

static PyObject *guard(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Arguments a;
    (void)self;
    if (!open_arguments(&a, GUARD, args, given)) return NULL;
    const uint8_t *frame = ARRAY(uint8_t, 0);
    const int64_t *t_ns = ARRAY(int64_t, 1), *plan = ARRAY(int64_t, 2);
    const uint8_t *is_short = ARRAY(uint8_t, 3);
    const int64_t *message_of = ARRAY(int64_t, 4);
    const Fields fields = {ARRAY(int64_t, 5), ARRAY(uint64_t, 6), ARRAY(uint64_t, 7), ARRAY(uint8_t, 8)};
    const int64_t *crc_base = ARRAY(int64_t, 9);
    const uint16_t *crc_table = ARRAY(uint16_t, 10), *crc_constant = ARRAY(uint16_t, 11);
    const uint8_t *has_crc = ARRAY(uint8_t, 12), *has_counter = ARRAY(uint8_t, 13);
    const int64_t *modulo = ARRAY(int64_t, 14);
    int64_t *last = ARRAY(int64_t, 15), *last_ns = ARRAY(int64_t, 16);
    uint8_t *last_payload = ARRAY(uint8_t, 17);
    int64_t *lost = ARRAY(int64_t, 18);
    uint8_t *code_out = ARRAY(uint8_t, 19);
    int64_t gap_ns = a.number[20], frames = a.view[0].len / FRAME_BYTES, messages = ITEMS(int64_t, 14);
    int64_t width = messages ? ITEMS(int64_t, 9) / messages : 0, refused = 0, lost_now = 0;
    int64_t plans = ITEMS(int64_t, 4), crcs = ITEMS(uint16_t, 10);
    PyObject *result = NULL;
    for (int i = 5; i < 8; i++)
        if (!holds(&a, i, 2 * messages, 8)) goto done;
    if (!holds(&a, 1, frames, 8) || !holds(&a, 2, frames, 8) || !holds(&a, 3, frames, 1) ||
        !holds(&a, 19, frames, 1) || !holds(&a, 15, messages, 8) || !holds(&a, 16, messages, 8) ||
        !holds(&a, 17, messages, DATA_BYTES) || !holds(&a, 18, messages, 8) || !holds(&a, 8, 2 * messages, 1) ||
        !holds(&a, 11, messages, 2) || !holds(&a, 12, messages, 1) || !holds(&a, 13, messages, 1) ||
        !inside_of("payload", width <= DATA_BYTES))
        goto done;
    bool within = true;
    for (int64_t n = 0; n < messages * width; n++)
        within &= in(crc_base[n], crcs - 255);
    if (!inside_of("byte", within)) goto done;
    memset(code_out, VALID, (size_t)frames);
    for (int64_t i = 0; i < frames; i++, frame += FRAME_BYTES) {
        if (!inside_of("plan", in(plan[i], plans))) goto done;
        int64_t m = message_of[plan[i]], t = t_ns[i];
        const uint8_t *payload = frame + DATA_AT;
        if (m < 0) continue;
        if (!inside_of("message", in(m, messages) && modulo[m] > 0 &&
                       in(fields.byte[m], DATA_BYTES - 7) && in(fields.byte[messages + m], DATA_BYTES - 7)))
            goto done;
        if (has_crc[m]) {
            const int64_t *base = crc_base + m * width;
            uint16_t crc = crc_constant[m];
            for (int64_t n = 0; n < width; n++)
                crc ^= crc_table[base[n] + payload[n]];
            if (is_short[i] || crc != field(&fields, payload, m)) { /* one cut short cannot be proved */
                code_out[i] = CRC;
                continue;
            }
        }
        if (!has_counter[m] || is_short[i]) continue;
        int64_t counter = field(&fields, payload, messages + m);
        if (counter >= modulo[m]) {
            code_out[i] = COUNTER;
            continue;
        }
        int64_t step = (counter - last[m]) % modulo[m];
        if (step < 0) step += modulo[m];
        uint8_t *before = last_payload + m * DATA_BYTES;
        if (last_ns[m] != NEVER_NS && t - last_ns[m] <= gap_ns) {
            if (step == 0) code_out[i] = memcmp(payload, before, DATA_BYTES) ? COUNTER : DUPLICATE;
            else if (step > 1) {
                lost[m] += step - 1;
                lost_now += step - 1;
            }
        }
        last[m] = counter;
        last_ns[m] = t;
        memcpy(before, payload, DATA_BYTES);
    }
    for (int64_t i = 0; i < frames; i++)
        refused += code_out[i] != VALID;
    result = Py_BuildValue("(LL)", (long long)refused, (long long)lost_now);
done:
    close_arguments(&a, GUARD);
    return result;
}

/* --- edge -------------------------------------------------------------------------------------------- */

/* settle(column, value, validity, t_ns, slot_of, upper, lower, counts, heard, pack value, pack t_ns, touched out,
 *        now_ns, laps) -> samples believed, or -1
 * Take a quiet batch in at once: the last believed value of each slot and its time, at most now_ns. -1, and nothing
 * is changed, where a value reaches a limit of its column, or no signal comes more than `laps` times. counts: room
 * for an integer a slot; touched: the slots that were believed. */
static const char SETTLE[] = "rrrrrrrwwwwwii";
static PyObject *settle(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Arguments a;
    (void)self;
    if (!open_arguments(&a, SETTLE, args, given)) return NULL;
    const int64_t *column = ARRAY(int64_t, 0);
    const double *value = ARRAY(double, 1);
    const uint8_t *validity = ARRAY(uint8_t, 2);
    const int64_t *t_ns = ARRAY(int64_t, 3), *slot_of = ARRAY(int64_t, 4);
    const double *upper = ARRAY(double, 5), *lower = ARRAY(double, 6);
    int64_t *counts = ARRAY(int64_t, 7), *pack_t_ns = ARRAY(int64_t, 10);
    uint8_t *heard = ARRAY(uint8_t, 8), *touched = ARRAY(uint8_t, 11);
    double *pack_value = ARRAY(double, 9);
    int64_t now_ns = a.number[12], laps = a.number[13], k = ITEMS(int64_t, 0), slots = ITEMS(int64_t, 4);
    PyObject *result = NULL;
    if (!holds(&a, 1, k, 8) || !holds(&a, 2, k, 1) || !holds(&a, 3, k, 8) || !holds(&a, 5, slots, 8) ||
        !holds(&a, 6, slots, 8) || !holds(&a, 7, slots, 8) || !holds(&a, 8, slots, 1) || !holds(&a, 9, slots, 8) ||
        !holds(&a, 10, slots, 8) || !holds(&a, 11, slots, 1))
        goto done;
    memset(counts, 0, (size_t)slots * sizeof *counts);
    memset(touched, 0, (size_t)slots);
    int64_t most = 0, believed = 0, left = 0;
    bool quiet = true;
    for (int64_t i = 0; quiet && i < k; i++) {
        int64_t c = column[i];
        if (!inside_of("column", in(c, slots) && in(slot_of[c], slots))) goto done;
        counts[slot_of[c]]++;
        believed += validity[i] == VALID && isfinite(value[i]);
        quiet = !(value[i] >= upper[c] || value[i] <= lower[c]);
    }
    for (int64_t slot = 0; slot < slots; slot++) {
        most = counts[slot] > most ? counts[slot] : most;
        left += counts[slot] > 0;
    }
    if (!quiet || most <= laps) {
        result = PyLong_FromLong(-1);
        goto done;
    }
    for (int64_t i = k - 1; i >= 0 && left; i--) { /* from behind: the last of a slot is found first */
        int64_t slot = slot_of[column[i]];
        if (touched[slot] || validity[i] != VALID || !isfinite(value[i])) continue;
        touched[slot] = 1;
        left--;
        pack_value[slot] = value[i];
        pack_t_ns[slot] = t_ns[i] < now_ns ? t_ns[i] : now_ns;
    }
    for (int64_t slot = 0; slot < slots; slot++)
        heard[slot] |= counts[slot] > 0;
    result = PyLong_FromLongLong(believed);
done:
    close_arguments(&a, SETTLE);
    return result;
}

/* fold(t_ns, column, value, validity, base, stride, is_other, cell scratch, counts, low, high, total, last, places
 *      out, reach, begin_ns, end_ns, fine start_ns, other start_ns, fine window_ns, other window_ns) -> states, or -1
 * Merge samples into their windows: the cell of a sample is base + window * stride of its column. A column whose
 * base is below 0 is a state's and has no windows; places: where its samples are. -1, and nothing is changed, where
 * a sample is not valid, or beyond +-reach, or not within begin_ns <= t_ns < end_ns. */
static const char FOLD[] = "rrrrrrrwwwwwwwdiiiiii";

typedef struct {
    const int64_t *base, *stride;
    const uint8_t *is_other;
    int64_t columns, cells, *cell;
    const int64_t *start_ns, *window_ns; /* of the fine and the other group */
    int64_t from_ns, until_ns;           /* as long as this, `cell` holds */
} Windows;

/* Fold what lies side by side: a frame's samples mostly do, and so several at a time. */
static void fold_run(const double *restrict value, int64_t *restrict counts, double *restrict low,
                     double *restrict high, double *restrict total, double *restrict last, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        double v = value[i];
        counts[i]++;
        total[i] += v;
        last[i] = v;
        low[i] = v < low[i] ? v : low[i];
        high[i] = v > high[i] ? v : high[i];
    }
}

/* Fill in the cell of every column for time t_ns; false, with the error set, where one lies outside. */
static bool turn_windows(Windows *w, int64_t t_ns)
{
    int64_t row[2];
    w->from_ns = INT64_MIN, w->until_ns = INT64_MAX;
    for (int group = 0; group < 2; group++) {
        int64_t size_ns = w->window_ns[group], since_ns = t_ns - w->start_ns[group];
        if (!inside_of("time", size_ns > 0 && since_ns >= 0)) return false;
        row[group] = since_ns / size_ns;
        int64_t from_ns = w->start_ns[group] + row[group] * size_ns;
        if (from_ns > w->from_ns) w->from_ns = from_ns;
        if (from_ns + size_ns < w->until_ns) w->until_ns = from_ns + size_ns;
    }
    for (int64_t c = 0; c < w->columns; c++) {
        w->cell[c] = w->base[c] < 0 ? -1 : w->base[c] + row[w->is_other[c] != 0] * w->stride[c];
        if (!inside_of("time", w->cell[c] < w->cells)) return false;
    }
    return true;
}

static PyObject *fold(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    Arguments a;
    (void)self;
    if (!open_arguments(&a, FOLD, args, given)) return NULL;
    const int64_t *t_ns = ARRAY(int64_t, 0), *column = ARRAY(int64_t, 1);
    const double *value = ARRAY(double, 2), reach = a.real[14];
    const uint8_t *validity = ARRAY(uint8_t, 3);
    int64_t *counts = ARRAY(int64_t, 8), *places = ARRAY(int64_t, 13);
    double *low = ARRAY(double, 9), *high = ARRAY(double, 10), *total = ARRAY(double, 11), *last = ARRAY(double, 12);
    const int64_t begin_ns = a.number[15], end_ns = a.number[16];
    Windows windows = {
        ARRAY(int64_t, 4), ARRAY(int64_t, 5), ARRAY(uint8_t, 6), ITEMS(int64_t, 4), ITEMS(int64_t, 8),
        ARRAY(int64_t, 7), &a.number[17], &a.number[19], 0, 0,
    };
    const int64_t k = ITEMS(int64_t, 0), columns = windows.columns;
    int64_t states = 0;
    PyObject *result = NULL;
    if (!holds(&a, 1, k, 8) || !holds(&a, 2, k, 8) || !holds(&a, 3, k, 1) || !holds(&a, 13, k, 8) ||
        !holds(&a, 5, columns, 8) || !holds(&a, 6, columns, 1) || !holds(&a, 7, columns, 8))
        goto done;
    for (int i = 9; i < 13; i++)
        if (!holds(&a, i, windows.cells, 8)) goto done;
    bool usual = true, known = true;
    for (int64_t i = 0; i < k; i++) {
        known &= in(column[i], columns);
        usual &= (validity[i] == VALID) & (fabs(value[i]) <= reach) & (begin_ns <= t_ns[i]) & (t_ns[i] < end_ns);
    }
    if (!inside_of("column", known)) goto done;
    if (!usual) {
        result = PyLong_FromLong(-1);
        goto done;
    }
    for (int64_t i = 0, n; i < k; i += n) {
        n = 1;
        if ((t_ns[i] < windows.from_ns || t_ns[i] >= windows.until_ns) && !turn_windows(&windows, t_ns[i])) goto done;
        int64_t c = column[i], cell = windows.cell[c];
        if (cell < 0) {
            places[states++] = i;
            continue;
        }
        while (i + n < k && column[i + n] == c + n && windows.cell[c + n] == cell + n && t_ns[i + n] == t_ns[i])
            n++;
        fold_run(value + i, counts + cell, low + cell, high + cell, total + cell, last + cell, n);
    }
    result = PyLong_FromLongLong(states);
done:
    close_arguments(&a, FOLD);
    return result;
}

/* --- the module -------------------------------------------------------------------------------------- */

#define FUNCTION(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
static PyMethodDef functions[] = {
    FUNCTION(plans), FUNCTION(decode), FUNCTION(details), FUNCTION(calm), FUNCTION(guard),
    FUNCTION(settle), FUNCTION(fold), {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "tbox._kernel", NULL, 0, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&module); }
