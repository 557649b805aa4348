//! A small line chart as a PNG: two axes, ticks with numbers, a line per series, a legend.

use std::io;

const WIDTH: usize = 900;
const HEIGHT: usize = 540;
const LEFT: usize = 90;
const RIGHT: usize = 20;
const TOP: usize = 64;
const BOTTOM: usize = 60;
/// Pixels of a picture element of a letter, and of a letter with the space behind it.
const DOT: usize = 2;
const ADVANCE: usize = 6 * DOT;

type Rgb = [u8; 3];
const BLACK: Rgb = [20, 20, 20];
const GREY: Rgb = [215, 215, 215];
const COLOURS: [Rgb; 6] =
    [[31, 119, 180], [214, 39, 40], [44, 160, 44], [148, 103, 189], [255, 127, 14], [23, 190, 207]];

/// Letters as five columns of seven dots, the lowest bit on top.
fn glyph(c: char) -> [u8; 5] {
    match c.to_ascii_uppercase() {
        '0' => [0x3E, 0x51, 0x49, 0x45, 0x3E],
        '1' => [0x00, 0x42, 0x7F, 0x40, 0x00],
        '2' => [0x42, 0x61, 0x51, 0x49, 0x46],
        '3' => [0x21, 0x41, 0x45, 0x4B, 0x31],
        '4' => [0x18, 0x14, 0x12, 0x7F, 0x10],
        '5' => [0x27, 0x45, 0x45, 0x45, 0x39],
        '6' => [0x3C, 0x4A, 0x49, 0x49, 0x30],
        '7' => [0x01, 0x71, 0x09, 0x05, 0x03],
        '8' => [0x36, 0x49, 0x49, 0x49, 0x36],
        '9' => [0x06, 0x49, 0x49, 0x29, 0x1E],
        'A' => [0x7E, 0x11, 0x11, 0x11, 0x7E],
        'B' => [0x7F, 0x49, 0x49, 0x49, 0x36],
        'C' => [0x3E, 0x41, 0x41, 0x41, 0x22],
        'D' => [0x7F, 0x41, 0x41, 0x22, 0x1C],
        'E' => [0x7F, 0x49, 0x49, 0x49, 0x41],
        'F' => [0x7F, 0x09, 0x09, 0x09, 0x01],
        'G' => [0x3E, 0x41, 0x49, 0x49, 0x7A],
        'H' => [0x7F, 0x08, 0x08, 0x08, 0x7F],
        'I' => [0x00, 0x41, 0x7F, 0x41, 0x00],
        'J' => [0x20, 0x40, 0x41, 0x3F, 0x01],
        'K' => [0x7F, 0x08, 0x14, 0x22, 0x41],
        'L' => [0x7F, 0x40, 0x40, 0x40, 0x40],
        'M' => [0x7F, 0x02, 0x0C, 0x02, 0x7F],
        'N' => [0x7F, 0x04, 0x08, 0x10, 0x7F],
        'O' => [0x3E, 0x41, 0x41, 0x41, 0x3E],
        'P' => [0x7F, 0x09, 0x09, 0x09, 0x06],
        'Q' => [0x3E, 0x41, 0x51, 0x21, 0x5E],
        'R' => [0x7F, 0x09, 0x19, 0x29, 0x46],
        'S' => [0x46, 0x49, 0x49, 0x49, 0x31],
        'T' => [0x01, 0x01, 0x7F, 0x01, 0x01],
        'U' => [0x3F, 0x40, 0x40, 0x40, 0x3F],
        'V' => [0x1F, 0x20, 0x40, 0x20, 0x1F],
        'W' => [0x3F, 0x40, 0x38, 0x40, 0x3F],
        'X' => [0x63, 0x14, 0x08, 0x14, 0x63],
        'Y' => [0x07, 0x08, 0x70, 0x08, 0x07],
        'Z' => [0x61, 0x51, 0x49, 0x45, 0x43],
        '.' => [0x00, 0x60, 0x60, 0x00, 0x00],
        ',' => [0x00, 0x50, 0x30, 0x00, 0x00],
        '/' => [0x20, 0x10, 0x08, 0x04, 0x02],
        '-' => [0x08, 0x08, 0x08, 0x08, 0x08],
        ':' => [0x00, 0x36, 0x36, 0x00, 0x00],
        _ => [0; 5],
    }
}

/// A line of a chart.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its name in the legend.
    pub name: String,
    /// Its points, ascending in x.
    pub points: Vec<(f64, f64)>,
}

/// A chart whose x axis is logarithmic (0 is drawn at its left end) and whose y axis begins at 0.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Above it.
    pub title: String,
    /// Below the x axis.
    pub x: String,
    /// Above the y axis.
    pub y: String,
    /// The lines.
    pub lines: Vec<Line>,
}

struct Canvas(Vec<u8>);

impl Canvas {
    fn dot(&mut self, x: usize, y: usize, colour: Rgb) {
        if x < WIDTH && y < HEIGHT {
            let at = (y * WIDTH + x) * 3;
            if let Some(pixel) = self.0.get_mut(at..at + 3) {
                pixel.copy_from_slice(&colour);
            }
        }
    }

    fn block(&mut self, x: usize, y: usize, size: usize, colour: Rgb) {
        for n in 0..size * size {
            self.dot(x + n % size, y + n / size, colour);
        }
    }

    fn text(&mut self, x: usize, y: usize, text: &str, colour: Rgb) {
        for (n, c) in text.chars().enumerate() {
            for (column, bits) in glyph(c).into_iter().enumerate() {
                for row in (0..7).filter(|row| bits >> row & 1 == 1) {
                    self.block(x + n * ADVANCE + column * DOT, y + row * DOT, DOT, colour);
                }
            }
        }
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: Rgb) {
        let steps = (to.0 - from.0).abs().max((to.1 - from.1).abs()).max(1.0);
        let count = pixel(steps);
        for n in 0..=count {
            let part = crate::bench::float(n as u64) / steps;
            let at = |a: f64, b: f64| pixel(a + (b - a) * part.min(1.0));
            self.block(at(from.0, to.0), at(from.1, to.1), 2, colour);
        }
    }
}

/// A coordinate as a pixel; what lies outside is cut off.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Bounded on the line itself.
fn pixel(at: f64) -> usize {
    at.round().clamp(0.0, 10_000.0) as usize
}

fn float(n: usize) -> f64 {
    crate::bench::float(n as u64)
}

/// 1, 2 or 5 times a power of ten, at least `n`.
fn round_up(n: f64) -> f64 {
    let power = 10f64.powf(n.max(1e-9).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|m| *m >= n).unwrap_or(n)
}

fn number(n: f64) -> String {
    match n {
        n if n >= 1e9 => format!("{:.1}G", n / 1e9),
        n if n >= 1e6 => format!("{:.1}M", n / 1e6),
        n if n >= 1e4 => format!("{:.0}K", n / 1e3),
        n => format!("{n:.0}"),
    }
}

impl Chart {
    /// Draws it.
    pub fn png(&self) -> io::Result<Vec<u8>> {
        let mut canvas = Canvas(vec![255; WIDTH * HEIGHT * 3]);
        let points = || self.lines.iter().flat_map(|l| &l.points);
        let most_x = points().map(|p| p.0).fold(1.0, f64::max);
        let least_x = points().map(|p| p.0).filter(|x| *x > 0.0).fold(most_x, f64::min) / 2.0;
        let most_y = round_up(points().map(|p| p.1).fold(1e-9, f64::max));
        let (width, height) = (float(WIDTH - LEFT - RIGHT), float(HEIGHT - TOP - BOTTOM));
        let x_of = |x: f64| float(LEFT) + (x.max(least_x) / least_x).ln() / (most_x / least_x).ln() * width;
        let y_of = |y: f64| float(TOP) + (1.0 - y / most_y) * height;
        let (left, right) = (float(LEFT), float(WIDTH - RIGHT));

        for n in 0..=4 {
            let y = most_y * float(n) / 4.0;
            canvas.line((left, y_of(y)), (right, y_of(y)), if n == 0 { BLACK } else { GREY });
            let text = number(y);
            canvas.text((LEFT - 8).saturating_sub(text.len() * ADVANCE), pixel(y_of(y)) - 7, &text, BLACK);
        }
        let mut ticks: Vec<f64> = points().map(|p| p.0).collect();
        ticks.sort_unstable_by(f64::total_cmp);
        ticks.dedup();
        let mut free = 0;
        for x in ticks {
            let text = number(x);
            let at = pixel(x_of(x)).saturating_sub(text.len() * ADVANCE / 2);
            canvas.line((x_of(x), y_of(0.0)), (x_of(x), y_of(0.0) + 5.0), BLACK);
            if at >= free {
                canvas.text(at, HEIGHT - BOTTOM + 10, &text, BLACK);
                free = at + (text.len() + 1) * ADVANCE;
            }
        }
        canvas.line((left, y_of(0.0)), (left, y_of(most_y)), BLACK);
        canvas.text(LEFT, 8, &self.title, BLACK);
        canvas.text(8, TOP - 30, &self.y, BLACK);
        canvas.text(WIDTH / 2 - self.x.len() * ADVANCE / 2, HEIGHT - 24, &self.x, BLACK);
        for (n, (line, colour)) in self.lines.iter().zip(COLOURS.into_iter().cycle()).enumerate() {
            for pair in line.points.windows(2) {
                if let [a, b] = pair {
                    canvas.line((x_of(a.0), y_of(a.1)), (x_of(b.0), y_of(b.1)), colour);
                }
            }
            for (x, y) in &line.points {
                canvas.block(pixel(x_of(*x)).saturating_sub(2), pixel(y_of(*y)).saturating_sub(2), 6, colour);
            }
            let at = (
                WIDTH - RIGHT - 20 * ADVANCE,
                HEIGHT - BOTTOM - 20 * (self.lines.len().min(15) + 1 - n.min(15)),
            );
            canvas.block(at.0 - 18, at.1 + 1, 11, colour);
            canvas.text(at.0, at.1, &line.name, BLACK);
        }
        encode(&canvas.0)
    }
}

fn encode(pixels: &[u8]) -> io::Result<Vec<u8>> {
    let side = |n: usize| u32::try_from(n).unwrap_or(0);
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, side(WIDTH), side(HEIGHT));
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(io::Error::other)?;
    writer.write_image_data(pixels).map_err(io::Error::other)?;
    writer.finish().map_err(io::Error::other)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_is_a_png_whatever_is_in_it() {
        for points in [vec![], vec![(0.0, 0.0)], vec![(0.0, 5.0), (10.0, 1e9)], vec![(1.0, 1.0), (1.0, 2.0)]]
        {
            let line = Line { name: "2 members".into(), points };
            let chart = Chart { title: "a/b: c".into(), x: "us".into(), y: "1/s".into(), lines: vec![line] };
            let png = chart.png().unwrap();
            assert!(png.starts_with(b"\x89PNG") && png.len() > 1000);
        }
        assert_eq!([round_up(7.0), round_up(0.3), round_up(20.0)], [10.0, 0.5, 20.0]);
    }
}
