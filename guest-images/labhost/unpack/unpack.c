/*
 * Puts the kernel in place: an ELF64 file in an LZ4 legacy frame.
 *
 * Debian packs its kernel with XZ, which takes an emulated CPU a minute to unpack; LZ4 takes seconds. The kernel itself stays
 * as it is. Runs once, in a virtual host that we start: its input is not hostile, so a broken one just stops here.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

/* Where the file is unpacked before its segments are copied; above the kernel, this program and the initramfs's lowest place. */
#define SCRATCH ((u8 *)(256ul << 20))

static void stop(void)
{
    for (;;)
        __asm__ volatile("cli; hlt");
}

static void copy(u8 *to, const u8 *from, u64 count)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

static u32 get32(const u8 *from)
{
    return from[0] | from[1] << 8 | from[2] << 16 | (u32)from[3] << 24;
}

static u64 length(u64 nibble, const u8 **in)
{
    if (nibble == 15) {
        u8 more;
        do {
            more = *(*in)++;
            nibble += more;
        } while (more == 255);
    }
    return nibble;
}

/* One LZ4 block (lz4 block format): literals, then a match at most 64 KiB back; the last sequence has no match. */
static u8 *block(const u8 *in, const u8 *end, u8 *out)
{
    for (;;) {
        u8 token = *in++;
        u64 literals = length(token >> 4, &in);
        copy(out, in, literals);
        out += literals;
        in += literals;
        if (in >= end)
            return out;
        u64 back = in[0] | in[1] << 8;
        in += 2;
        u64 match = length(token & 15, &in) + 4;
        /* Byte by byte on purpose where the ranges overlap: that is how LZ4 repeats. */
        copy(out, out - back, match);
        out += match;
    }
}

/* LZ4 legacy frame: magic, then (size, block) until a size of zero. */
static void frame(const u8 *in, u8 *out)
{
    if (get32(in) != 0x184C2102)
        stop();
    for (in += 4; get32(in); in += 4 + get32(in))
        out = block(in + 4, in + 4 + get32(in), out);
}

u64 unpack(const u8 *packed)
{
    u8 *file = SCRATCH;
    frame(packed, file);
    if (get32(file) != 0x464C457F)
        stop();
    const u8 *header = file + *(u64 *)(file + 32);
    u16 size = *(u16 *)(file + 54), count = *(u16 *)(file + 56);
    for (; count; count--, header += size) {
        if (get32(header) != 1) /* PT_LOAD */
            continue;
        u64 offset = *(u64 *)(header + 8), to = *(u64 *)(header + 24);
        u64 in_file = *(u64 *)(header + 32), in_memory = *(u64 *)(header + 40);
        copy((u8 *)to, file + offset, in_file);
        for (u8 *rest = (u8 *)to + in_file; in_file < in_memory; in_file++)
            *rest++ = 0;
    }
    return *(u64 *)(file + 24);
}
