/*
 * What a disk may read as after a power cut: a model for unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * See thinvm-crash-model.h.
 */
#include "qemu/osdep.h"
#include "thinvm-crash-model.h"

/* What sector @sector of a slot may read as */
typedef struct Allowed {
    unsigned sector;
    uint64_t tag;
} Allowed;

struct ModelLook {
    Model *model;
    unsigned first;             /* sector */
    GArray *allowed;            /* Allowed */
};

static void history_add(History *h, Value value)
{
    if (h->nb == h->allocated) {
        h->allocated = h->allocated ? h->allocated * 2 : 2;
        h->values = g_renew(Value, h->values, h->allocated);
    }
    h->values[h->nb++] = value;
}

static bool superseded(const Value *v, uint64_t floor)
{
    return v->completed && v->completed <= floor;
}

/* Begin of the last write that completed at @clock or before */
static uint64_t floor_at(const History *h, uint64_t clock)
{
    uint64_t floor = 0;

    for (unsigned i = 0; i < h->nb; i++) {
        const Value *v = &h->values[i];

        if (superseded(v, clock) && !v->failed) {
            floor = MAX(floor, v->begun);
        }
    }
    return floor;
}

Model *model_new(const uint64_t *tags, uint64_t next_tag)
{
    Model *m = g_new0(Model, 1);

    m->looks = g_ptr_array_new();
    m->next_tag = next_tag;
    m->clock = 1;
    for (unsigned i = 0; i < NB_SECTORS; i++) {
        history_add(&m->sectors[i], (Value) {
            .tag = tags ? tags[i] : TAG_ZERO,
            .completed = 1,
        });
    }
    return m;
}

void model_free(Model *m)
{
    for (unsigned i = 0; i < NB_SECTORS; i++) {
        g_free(m->sectors[i].values);
    }
    for (unsigned i = 0; i < MAX_SNAPSHOTS; i++) {
        g_free(m->snapshots[i]);
    }
    g_assert(!m->looks->len);
    g_ptr_array_free(m->looks, true);
    g_free(m);
}

Model *model_copy(const Model *m)
{
    Model *copy = g_new0(Model, 1);

    copy->looks = g_ptr_array_new();
    copy->next_tag = m->next_tag;
    copy->clock = m->clock;
    for (unsigned i = 0; i < NB_SECTORS; i++) {
        const History *h = &m->sectors[i];

        copy->sectors[i] = *h;
        copy->sectors[i].values = g_memdup2(h->values,
                                            h->allocated * sizeof(Value));
    }
    return copy;
}

static void look_add(ModelLook *look, unsigned sector, uint64_t tag)
{
    Allowed a = { sector, tag };

    if (sector >= look->first && sector < look->first + IMAGE_SECTORS) {
        g_array_append_val(look->allowed, a);
    }
}

uint64_t model_begin(Model *m, unsigned first, unsigned nb, uint64_t tag)
{
    uint64_t begun = ++m->clock;

    for (unsigned i = first; i < first + nb; i++) {
        history_add(&m->sectors[i], (Value) { .tag = tag, .begun = begun });
        for (guint j = 0; j < m->looks->len; j++) {
            look_add(g_ptr_array_index(m->looks, j), i, tag);
        }
    }
    return begun;
}

static void complete(Model *m, unsigned first, unsigned nb, uint64_t begun,
                     bool failed)
{
    uint64_t now = ++m->clock;

    for (unsigned i = first; i < first + nb; i++) {
        History *h = &m->sectors[i];

        for (unsigned j = 0; j < h->nb; j++) {
            if (h->values[j].begun == begun) {
                h->values[j].completed = now;
                h->values[j].failed = failed;
            }
        }
    }
}

void model_end(Model *m, unsigned first, unsigned nb, uint64_t begun)
{
    complete(m, first, nb, begun, false);
}

void model_fail(Model *m, unsigned first, unsigned nb, uint64_t begun)
{
    complete(m, first, nb, begun, true);
}

void model_committed(Model *m, unsigned first, unsigned nb, uint64_t begun)
{
    for (unsigned i = first; i < first + nb; i++) {
        m->sectors[i].committed = MAX(m->sectors[i].committed, begun);
    }
}

void model_flushed(Model *m, uint64_t clock)
{
    for (unsigned s = 0; s < NB_SECTORS; s++) {
        History *h = &m->sectors[s];
        uint64_t floor = h->nb > 1 ? floor_at(h, clock) : 0;
        unsigned left = 0;

        for (unsigned i = 0; i < h->nb; i++) {
            if (!superseded(&h->values[i], floor)) {
                h->values[left++] = h->values[i];
            }
        }
        h->nb = left;
    }
}

bool model_allows(const Model *m, unsigned sector, bool process_only,
                  uint64_t tag)
{
    const History *h = &m->sectors[sector];
    uint64_t floor = process_only ? h->committed : 0;

    for (unsigned i = 0; i < h->nb; i++) {
        if (h->values[i].tag == tag && !superseded(&h->values[i], floor)) {
            return true;
        }
    }
    return false;
}

bool model_current(const Model *m, unsigned sector, uint64_t *tag)
{
    const History *h = &m->sectors[sector];
    uint64_t floor = floor_at(h, m->clock);
    bool found = false;

    for (unsigned i = 0; i < h->nb; i++) {
        if (superseded(&h->values[i], floor)) {
            continue;
        }
        if (found && h->values[i].tag != *tag) {
            return false;
        }
        *tag = h->values[i].tag;
        found = true;
    }
    g_assert(found);
    return true;
}

ModelLook *model_look(Model *m, unsigned slot, bool committed)
{
    ModelLook *look = g_new(ModelLook, 1);

    look->model = m;
    look->first = slot * IMAGE_SECTORS;
    look->allowed = g_array_new(false, false, sizeof(Allowed));
    for (unsigned i = look->first; i < look->first + IMAGE_SECTORS; i++) {
        const History *h = &m->sectors[i];
        uint64_t floor = committed ? h->committed : floor_at(h, m->clock);

        for (unsigned j = 0; j < h->nb; j++) {
            if (!superseded(&h->values[j], floor)) {
                look_add(look, i, h->values[j].tag);
            }
        }
    }
    /* and what comes while it lasts */
    g_ptr_array_add(m->looks, look);
    return look;
}

bool model_look_allows(const ModelLook *look, unsigned i, uint64_t tag)
{
    for (guint j = 0; j < look->allowed->len; j++) {
        const Allowed *a = &g_array_index(look->allowed, Allowed, j);

        if (a->sector == look->first + i && a->tag == tag) {
            return true;
        }
    }
    return false;
}

void model_look_free(ModelLook *look)
{
    g_ptr_array_remove_fast(look->model->looks, look);
    g_array_free(look->allowed, true);
    g_free(look);
}
