/* Kernels that copy rows, in PTX, which any driver compiles for the GPU that there is. */
#ifndef MESH_COPY_ROWS_H
#define MESH_COPY_ROWS_H

#include <stdint.h>

enum { UNIT_BYTES = 16, MAX_COPIES = 32 };

typedef struct {
    uint64_t to, from, units; /* of UNIT_BYTES */
    uint64_t permit, wanted;  /* none where `permit` is not NULL and the 64 bits there are not `wanted` */
} row_copy;

/* What a graph brings, or takes away. On the host, written before it is launched. */
typedef struct {
    uint64_t count, unused; /* as long as a unit */
    row_copy copies[MAX_COPIES];
} copy_list;

/* copy_listed(list), behind whatever the graph does before: one after the other, a thread for each unit
 * of all of them. Each block reads the list: a line of the host's memory takes a microsecond to come,
 * and holds two copies; many blocks that ask for it would take it much longer. */
enum { LISTED_AT_ONCE = 4, MAX_LISTED_BLOCKS = 128 };
#define COPY_LISTED(TARGET, WAIT)                                                                   \
    ".version 7.8\n"                                                                                \
    ".target " TARGET "\n"                                                                          \
    ".address_size 64\n"                                                                            \
    ".visible .entry copy_listed(.param .u64 list)\n"                                               \
    "{\n"                                                                                           \
    "  .reg .pred %mine, %few, %none, %other, %past, %in<4>;\n"                                     \
    "  .reg .b32 %block, %threads, %thread, %blocks, %lane, %w<4>, %a<4>, %b<4>, %c<4>, %d<4>;\n"   \
    "  .reg .b64 %list, %count, %copy, %permit, %said, %wanted, %unit, %step, %units, %to, %from,\n"  \
    "    %at, %u<4>, %source<4>, %target<4>;\n"                                                     \
    "  .shared .align 16 .b8 kept[1296];\n"                                                         \
    "  ld.param.u64 %list, [list];\n"                                                               \
    "  mov.u32 %block, %ctaid.x;\n"                                                                 \
    "  mov.u32 %threads, %ntid.x;\n"                                                                \
    "  mov.u32 %thread, %tid.x;\n"                                                                  \
    "  mov.u32 %blocks, %nctaid.x;\n"                                                               \
    "  mul.wide.u32 %unit, %block, %threads;\n"                                                     \
    "  cvt.u64.u32 %at, %thread;\n"                                                                 \
    "  add.u64 %unit, %unit, %at;\n"                                                                \
    "  mul.wide.u32 %step, %blocks, %threads;\n"                                                    \
    "  mul.wide.u32 %at, %thread, 16;\n"                                                            \
    "  add.u64 %list, %list, %at;\n"                                                                \
    "  mov.u64 %copy, kept;\n"                                                                      \
    "  add.u64 %at, %copy, %at;\n"                                                                  \
    "  setp.lt.u32 %mine, %thread, 8;\n"                                                            \
    "  @%mine ld.volatile.global.v4.u32 {%w0, %w1, %w2, %w3}, [%list];\n"                           \
    "  @%mine st.shared.v4.u32 [%at], {%w0, %w1, %w2, %w3};\n"                                      \
    "  bar.sync 0;\n"                                                                               \
    "  ld.shared.u64 %count, [kept];\n"                                                             \
    "  setp.le.u64 %few, %count, 2;\n"                                                              \
    "  @%few bra READ;\n"                                                                           \
    "  sub.u32 %lane, %thread, 8;\n"                                                                \
    "  setp.lt.u32 %mine, %lane, 73;\n"                                                             \
    "  @%mine ld.volatile.global.v4.u32 {%w0, %w1, %w2, %w3}, [%list];\n"                           \
    "  @%mine st.shared.v4.u32 [%at], {%w0, %w1, %w2, %w3};\n"                                      \
    "  bar.sync 0;\n"                                                                               \
    "READ:\n" WAIT                                                                                  \
    "  add.u64 %copy, %copy, 16;\n"                                                                 \
    "COPY:\n"                                                                                       \
    "  setp.eq.u64 %past, %count, 0;\n"                                                             \
    "  @%past bra END;\n"                                                                           \
    "  ld.shared.u64 %to, [%copy];\n"                                                               \
    "  ld.shared.u64 %from, [%copy+8];\n"                                                           \
    "  ld.shared.u64 %units, [%copy+16];\n"                                                         \
    "  ld.shared.u64 %permit, [%copy+24];\n"                                                        \
    "  ld.shared.u64 %wanted, [%copy+32];\n"                                                        \
    "  add.u64 %copy, %copy, 40;\n"                                                                 \
    "  sub.u64 %count, %count, 1;\n"                                                                \
    "  setp.eq.u64 %none, %permit, 0;\n"                                                            \
    "  @%none bra UNIT;\n"                                                                          \
    "  ld.volatile.global.u64 %said, [%permit];\n"                                                  \
    "  setp.ne.u64 %other, %said, %wanted;\n"                                                       \
    "  @%other bra COPY;\n"                                                                         \
    "UNIT:\n"                                                                                       \
    "  setp.ge.u64 %past, %unit, %units;\n"                                                         \
    "  @%past bra NEXT;\n"                                                                          \
    COPY_LISTED_LOAD("0") COPY_LISTED_LOAD("1") COPY_LISTED_LOAD("2") COPY_LISTED_LOAD("3")         \
    COPY_LISTED_STORE("0") COPY_LISTED_STORE("1") COPY_LISTED_STORE("2") COPY_LISTED_STORE("3")     \
    "  bra UNIT;\n"                                                                                 \
    "NEXT:\n"                                                                                       \
    "  sub.u64 %unit, %unit, %units;\n"                                                             \
    "  bra COPY;\n"                                                                                 \
    "END:\n"                                                                                        \
    "  ret;\n"                                                                                      \
    "}\n"
/* The next of a thread's units, of which several are on their way at once. */
#define COPY_LISTED_LOAD(N)                                                                         \
    "  setp.lt.u64 %in" N ", %unit, %units;\n"                                                      \
    "  shl.b64 %u" N ", %unit, 4;\n"                                                                \
    "  add.u64 %source" N ", %from, %u" N ";\n"                                                     \
    "  add.u64 %target" N ", %to, %u" N ";\n"                                                       \
    "  @%in" N " ld.global.v4.u32 {%a" N ", %b" N ", %c" N ", %d" N "}, [%source" N "];\n"          \
    "  @%in" N " add.u64 %unit, %unit, %step;\n"
#define COPY_LISTED_STORE(N)                                                                        \
    "  @%in" N " st.global.v4.u32 [%target" N "], {%a" N ", %b" N ", %c" N ", %d" N "};\n"
/* From Hopper on it is made ready while the kernel before it ends: see mesh/dependent_launch.py. */
static const char COPY_LISTED_DEPENDENT[] = COPY_LISTED("sm_90", "  griddepcontrol.wait;\n");
static const char COPY_LISTED_PLAIN[] = COPY_LISTED("sm_70", "");

/* copy_rows(copies): one of MAX_COPIES for each row of blocks, a thread for each unit. A launch takes the
 * host longer than their list takes to be copied with it. */
static const char COPY_ROWS[] =
    ".version 7.0\n"
    ".target sm_70\n"
    ".address_size 64\n"
    ".visible .entry copy_rows(.param .align 8 .b8 copies[1280])\n"
    "{\n"
    "  .reg .pred %none, %other, %past;\n"
    "  .reg .b32 %part, %block, %threads, %thread, %blocks, %a, %b, %c, %d;\n"
    "  .reg .b64 %copy, %permit, %said, %wanted, %unit, %step, %units, %to, %from, %at, %source, %target;\n"
    "  mov.u32 %part, %ctaid.y;\n"
    "  mul.wide.u32 %at, %part, 40;\n"
    "  mov.u64 %copy, copies;\n"
    "  add.u64 %copy, %copy, %at;\n"
    "  ld.param.u64 %to, [%copy];\n"
    "  ld.param.u64 %from, [%copy+8];\n"
    "  ld.param.u64 %units, [%copy+16];\n"
    "  ld.param.u64 %permit, [%copy+24];\n"
    "  ld.param.u64 %wanted, [%copy+32];\n"
    "  mov.u32 %block, %ctaid.x;\n"
    "  mov.u32 %threads, %ntid.x;\n"
    "  mov.u32 %thread, %tid.x;\n"
    "  mov.u32 %blocks, %nctaid.x;\n"
    "  mul.wide.u32 %unit, %block, %threads;\n"
    "  cvt.u64.u32 %at, %thread;\n"
    "  add.u64 %unit, %unit, %at;\n"
    "  mul.wide.u32 %step, %blocks, %threads;\n"
    "  setp.eq.u64 %none, %permit, 0;\n"
    "  @%none bra UNIT;\n"
    "  ld.volatile.global.u64 %said, [%permit];\n"
    "  setp.ne.u64 %other, %said, %wanted;\n"
    "  @%other bra END;\n"
    "UNIT:\n"
    "  setp.ge.u64 %past, %unit, %units;\n"
    "  @%past bra END;\n"
    "  shl.b64 %at, %unit, 4;\n"
    "  add.u64 %source, %from, %at;\n"
    "  add.u64 %target, %to, %at;\n"
    "  ld.global.v4.u32 {%a, %b, %c, %d}, [%source];\n"
    "  st.global.v4.u32 [%target], {%a, %b, %c, %d};\n"
    "  add.u64 %unit, %unit, %step;\n"
    "  bra UNIT;\n"
    "END:\n"
    "  ret;\n"
    "}\n";

#endif
